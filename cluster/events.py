"""What happens in a job, an event a line on stderr.

For log collectors a line is one JSON object; on a terminal it is a short line for people:

    {"time": "2026-01-31T12:00:00+00:00", "level": "info", "event": "checkpoint", "step": 400}
    12:00:00 checkpoint step=400
"""

import json
import logging
import math
import sys
from datetime import datetime, timezone
from typing import Any

from tqdm import tqdm

EVENTS = logging.getLogger("sepico.events")
LEVELS = ("debug", "info", "warning", "error")


def set_log_level(level: str) -> None:
    """Show events of `level` (one of LEVELS) and above."""
    EVENTS.setLevel(level.upper())
    EVENTS.propagate = False
    if not EVENTS.handlers:
        EVENTS.addHandler(_EventHandler())


def log_event(level: str, name: str, fields: dict[str, Any]) -> None:
    """Log an event; `fields` are JSON values."""
    EVENTS.log(logging.getLevelName(level.upper()), name, extra={"fields": fields})


class _EventHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        fields = {key: _finite(value) for key, value in record.fields.items()}
        time = datetime.fromtimestamp(record.created, timezone.utc)
        if sys.stderr.isatty():
            words = [fields.pop("message", "")] + [f"{k}={_short(v)}" for k, v in fields.items()]
            line = f"{time.astimezone():%H:%M:%S} {record.msg} {' '.join(filter(None, words))}"
        else:
            head = {"time": time.isoformat(timespec="milliseconds")}
            head |= {"level": record.levelname.lower(), "event": record.msg}
            line = json.dumps(head | fields)
        tqdm.write(line, file=sys.stderr)  # above a progress bar, not through it


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
