"""What a run leaves behind: folder, table, checkpoints, provenance, log. `checkpoint` and `recovery` need torch."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.record.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_checkpoint
    from norm_matters.record.files import check_room, remove_temporaries, write_file
    from norm_matters.record.folder import (
        claim_run_folder,
        default_name,
        find_begun,
        find_checkpoint,
        is_run,
        latest_checkpoint,
        launch_entry,
    )
    from norm_matters.record.instruments import (
        Measurements,
        append_measurements,
        read_measurements,
        trim_measurements,
        write_layout,
    )
    from norm_matters.record.lock import held
    from norm_matters.record.log import RunLog
    from norm_matters.record.provenance import (
        append_event,
        collect_provenance,
        note_unreadable,
        read_provenance,
        write_provenance,
    )
    from norm_matters.record.recovery import Recovered, has_checkpoints, newest_whole, set_aside
    from norm_matters.record.status import write_status
    from norm_matters.record.table import COLUMNS, TIMING_COLUMNS, append_row, read_table, trim_table

__all__ = [
    "COLUMNS",
    "TIMING_COLUMNS",
    "Checkpoint",
    "Measurements",
    "Recovered",
    "RunLog",
    "append_event",
    "append_measurements",
    "append_row",
    "check_room",
    "claim_run_folder",
    "collect_provenance",
    "default_name",
    "find_begun",
    "find_checkpoint",
    "has_checkpoints",
    "held",
    "is_run",
    "latest_checkpoint",
    "launch_entry",
    "load_checkpoint",
    "newest_whole",
    "note_unreadable",
    "read_measurements",
    "read_provenance",
    "read_table",
    "remove_temporaries",
    "save_checkpoint",
    "set_aside",
    "trim_measurements",
    "trim_table",
    "write_checkpoint",
    "write_file",
    "write_layout",
    "write_provenance",
    "write_status",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint", "write_checkpoint"),
        "files": ("check_room", "remove_temporaries", "write_file"),
        "folder": (
            "claim_run_folder",
            "default_name",
            "find_begun",
            "find_checkpoint",
            "is_run",
            "latest_checkpoint",
            "launch_entry",
        ),
        "instruments": (
            "Measurements",
            "append_measurements",
            "read_measurements",
            "trim_measurements",
            "write_layout",
        ),
        "lock": ("held",),
        "log": ("RunLog",),
        "provenance": ("append_event", "collect_provenance", "note_unreadable", "read_provenance", "write_provenance"),
        "recovery": ("Recovered", "has_checkpoints", "newest_whole", "set_aside"),
        "status": ("write_status",),
        "table": ("COLUMNS", "TIMING_COLUMNS", "append_row", "read_table", "trim_table"),
    },
)
