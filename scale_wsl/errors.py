"""The one exception that means "the user can mend this".

Everything that a user can get wrong - a recipe key, a folder, a ds_config - raises `UserError` with one sentence that
says what is wrong, where, and what would be right. Entry points print that sentence and exit with code 2; any other
exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake that the user can mend; its message is one clear sentence, shown without a traceback."""
