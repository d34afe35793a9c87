"""What a run leaves behind: its folder, table, checkpoints, provenance and log. Only `checkpoint` imports torch."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.record.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_checkpoint
    from norm_matters.record.files import remove_temporaries, write_file
    from norm_matters.record.folder import (
        claim_run_folder,
        default_name,
        find_begun,
        find_checkpoint,
        is_run,
        latest_checkpoint,
    )
    from norm_matters.record.instruments import (
        Measurements,
        append_measurements,
        read_measurements,
        trim_measurements,
        write_layout,
    )
    from norm_matters.record.log import RunLog
    from norm_matters.record.provenance import append_event, collect_provenance, write_provenance
    from norm_matters.record.table import COLUMNS, TIMING_COLUMNS, append_row, read_table, trim_table

__all__ = [
    "COLUMNS",
    "TIMING_COLUMNS",
    "Checkpoint",
    "Measurements",
    "RunLog",
    "append_event",
    "append_measurements",
    "append_row",
    "claim_run_folder",
    "collect_provenance",
    "default_name",
    "find_begun",
    "find_checkpoint",
    "is_run",
    "latest_checkpoint",
    "load_checkpoint",
    "read_measurements",
    "read_table",
    "remove_temporaries",
    "save_checkpoint",
    "trim_measurements",
    "trim_table",
    "write_checkpoint",
    "write_file",
    "write_layout",
    "write_provenance",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint", "write_checkpoint"),
        "files": ("remove_temporaries", "write_file"),
        "folder": (
            "claim_run_folder",
            "default_name",
            "find_begun",
            "find_checkpoint",
            "is_run",
            "latest_checkpoint",
        ),
        "instruments": (
            "Measurements",
            "append_measurements",
            "read_measurements",
            "trim_measurements",
            "write_layout",
        ),
        "log": ("RunLog",),
        "provenance": ("append_event", "collect_provenance", "write_provenance"),
        "table": ("COLUMNS", "TIMING_COLUMNS", "append_row", "read_table", "trim_table"),
    },
)
