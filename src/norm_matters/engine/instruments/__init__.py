"""What a run can say about its weights and norms while it trains; one file per family, driven by `collect`.

Measuring changes nothing: no weight, no running statistic, no random stream, no flag.
"""
