"""fetch: source lock → bundle. Brings every locked file, checked, and the tool itself; a second run, nothing.

wanted     what a bundle holds by its lock, and how each file of it is brought       (wanted.py)
provided   verifies the models that the machine has, where they lie                  (provided.py)
plan       which of the files are in place, in the store, or to be brought           (files.py)
transfer   those that are missing, in parallel, into the store, then the bundle      (files.py)
selfpack   wheels of envbuilder and its trainer, from what is running                (selfpack.py)
closure    proves that the bundle's files alone are enough                           (closure.py)
stage      puts the bundle together, `bundle.json` last                              (stage.py)
export     lists for wget, curl and aria2 what is missing                            (export.py)
adopt      takes what such a tool has brought, and completes the bundle              (adopt.py)
start.py   goes into the bundle: sets up the tool on a machine without internet
"""

from envbuilder.fetch.stage import FetchReport, fetch_bundle
from envbuilder.fetch.wanted import Origins

__all__ = ["FetchReport", "Origins", "fetch_bundle"]
