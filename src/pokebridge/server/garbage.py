"""When Python looks for garbage: objects that are no longer in use, and refer to each other.

All others are freed at once. By default Python looks for garbage whenever it has made 700 objects
more than it has freed. A few dozen requests under way have as many. So it would visit the objects
of such requests again and again, and find no garbage.
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
