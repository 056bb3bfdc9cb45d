"""`python -m envbuilder`, for jobs and for places where the script is not on the PATH."""

from envbuilder.cli import main

main()
