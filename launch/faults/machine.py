"""What figures were seen on, and when: beside them in every file of results."""

import os
import platform
from datetime import date


def machine() -> dict[str, object]:
    return {"date": str(date.today()), "cores": os.cpu_count(), "system": platform.platform()}
