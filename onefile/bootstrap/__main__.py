"""What Python runs of the one file. Any Python 3 can read it, to be told which one is needed."""

import sys

OLDEST = (3, 9)


def main():
    if sys.version_info < OLDEST:
        sys.stderr.write(
            "envbuilder needs Python {}.{} or newer, and this is Python {}.{} ({}).\n"
            "  remedy: see what the cluster has (module avail python), load one (e.g. module load "
            "python/3.11), then: python3 {}\n".format(
                *OLDEST + sys.version_info[:2] + (sys.executable, " ".join(sys.argv))
            )
        )
        sys.exit(7)
    import runpy

    from unpacking import unpacked_tool

    runpy.run_path(str(unpacked_tool()), run_name="__main__")


main()
