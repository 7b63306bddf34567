"""How every command of the package ends: in one line, whatever happens."""

import sys
from collections.abc import Callable


def run(name: str, main: Callable[[], int | None]) -> None:
    """Call a command's `main` and leave the process: with its exit code, or with one line on the standard error.

    Wrong input (ValueError, also by the file system: OSError) ends with 1 and its message; an interruption with 130, as a
    shell expects it, and the way to go on. Anything else is a defect and shows its traceback.
    """
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        again = "what is finished is kept, and the same command goes on from there"
        print(f"{name}: interrupted; {again}", file=sys.stderr)
        sys.exit(130)
