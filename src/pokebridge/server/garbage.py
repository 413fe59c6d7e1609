"""When Python looks for garbage: objects that are no longer in use, and refer to each other.

All others are freed at once. A look visits the objects that were made since the last one and are
still there. Python looks after 700 of them, which is as many as a few dozen requests under way
have. So it would look at the same objects again and again, without finding any garbage.
"""

import gc
from typing import Final

# As many as are visited in a fraction of a millisecond. What is left after three looks at the
# newest objects is visited once more.
_NEW_OBJECTS: Final = 5000
_LOOKS_AT_NEW: Final = 2


def keep_what_exists() -> None:
    """Never visit the objects that exist now, and look at new ones less often from now on.

    A look at all objects, which follows whenever their number has grown by a quarter, would delay
    pokes by 0.1 s.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, _LOOKS_AT_NEW)
