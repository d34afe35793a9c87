"""Batch normalisation in as few passes over memory as there can be, alone or with an addition and a ReLU behind it.

    y = act(d r w + b + residual),    d = x - mean,    r = 1 / sqrt(sigma^2 + eps),    act: the identity or max(., 0)

per channel; mean and sigma are those of the batch. One contract, several backends: `reference` (plain torch; any
statistic, dtype, device), `cpu` (C), `triton` (CUDA); `dispatch` takes the fastest that can do what is asked.

With n values per channel, S the sum over them, g the gradient of y where act passed it on (else 0), and
v = dsigma/dd = gain u:

    dresidual = g        dweight = S(g d) r        dbias = S(g)
    dx_i = r w (g_i - S(g) / n) - r^3 sigma w S(g d) (v_i - S(v) / n)
"""
