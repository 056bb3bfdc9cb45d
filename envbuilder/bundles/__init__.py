"""bundles: a bundle as a thing to carry, to check and to account for. Works offline, on what `fetch` made.

verify     reads every byte, and lists all that is not as locked   (verify.py)
pack       one file to carry: the same bundle gives the same bytes (pack.py)
unpack     the way back; unpack.py needs nothing but Python        (unpack.py, unpacking.py)
sbom       the bill of materials, CycloneDX                        (sbom.py; imported when it is asked for)
diff       what differs between two bundles                        (diff.py)
gc         removes from ROOT what nothing needs                    (gc.py)
"""

from envbuilder.bundles.diff import diff_bundles
from envbuilder.bundles.gc import GcReport, collect_garbage
from envbuilder.bundles.pack import PackReport, pack_bundle
from envbuilder.bundles.unpacking import UnpackReport, unpack_bundle
from envbuilder.bundles.verify import VerifyReport, verify_bundle

__all__ = [
    "GcReport",
    "PackReport",
    "UnpackReport",
    "VerifyReport",
    "collect_garbage",
    "diff_bundles",
    "pack_bundle",
    "unpack_bundle",
    "verify_bundle",
]
