"""sharing: an env that one member of a group has made, for all others. Works offline.

A shared folder holds a folder for each published name, and in it one for each version:

    SHARED/NAME/current.json     the sha256 of the manifest that counts
    SHARED/NAME/<16 digits>/     a version, named after its manifest's sha256; never changed
        manifest.json            size and sha256 of every file
        bundles/RECIPE/          the bundle, as under a ROOT
        wheelhouse/<abi-key>/    the built wheels of the env, each with its receipt
        cache/kernels/RECIPE/    the kernels that were compiled so far
        images/                  where the env is kept as an image: that, with its receipt

publish    puts a version there, whole or not at all    (publish.py)
use        checks every byte of it, and refers to it    (use.py)

Who may be believed, and what is refused, is in shared_folder.py.
"""

from envbuilder.sharing.publish import PublishReport, publish
from envbuilder.sharing.shared_folder import Listed, SharedFolder, list_published, open_shared_folder
from envbuilder.sharing.use import UseReport, use_published

__all__ = [
    "Listed",
    "PublishReport",
    "SharedFolder",
    "UseReport",
    "list_published",
    "open_shared_folder",
    "publish",
    "use_published",
]
