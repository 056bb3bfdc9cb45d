"""What sbatch says when it refuses a job, in words, each with what to do about it. A table, first match wins.

The texts are those of Slurm 22.05 (src/common/slurm_errno.c) and of its accounting limits, which come in a
line of their own before the general "Job violates accounting/QOS policy".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from envbuilder.errors import SlurmError
from envbuilder.site import JobSpec


@dataclass(frozen=True)
class Rejection:
    """One way to be refused. `{…}` in both texts are fields of the job's section of the site file."""

    pattern: str
    """Regular expression, searched in all that sbatch wrote."""
    message: str
    remedy: str


_MY_ASSOCIATIONS = "sacctmgr show associations user=$USER format=account%24,partition,qos%40"
_PARTITION_LIMITS = "scontrol show partition {partition}"
_QOS_LIMITS = "sacctmgr show qos {qos} format=name,maxwall,maxsubmitpu,maxjobspu,maxtrespu%40"

REJECTIONS = (
    Rejection(
        r"QOSMaxSubmitJobPerUserLimit",
        "The QoS {qos} takes no further job of yours: as many as it allows are queued or running.",
        "Wait for that job to end, or cancel it (scancel JOBID), then submit again; it is in: "
        "squeue --me --qos={qos}",
    ),
    Rejection(
        r"(QOS|Assoc)\w*Submit\w*Limit",
        "Your account or QoS takes no further job: as many as it allows are queued or running.",
        "Wait for one to end, or cancel it (scancel JOBID), then submit again; they are in: squeue --me",
    ),
    Rejection(
        r"(QOS|Assoc)Grp\w*",
        "The account {account} or the QoS {qos} has used up what it may use in all.",
        f"Ask whoever manages the account, or set another one in the site file: {_MY_ASSOCIATIONS}",
    ),
    Rejection(
        r"(QOS|Assoc)\w*Wall\w*",
        "The walltime {walltime} is longer than the QoS {qos} or the account {account} allows.",
        f"Set a shorter walltime in the site file; the limit is shown by: {_QOS_LIMITS}",
    ),
    Rejection(
        r"(QOS|Assoc)\w*(GRES|GRes)\w*",
        "{gpus} GPUs are more than the QoS {qos} or the account {account} allows.",
        f"Set fewer gpus in the site file; the limit is shown by: {_QOS_LIMITS}",
    ),
    Rejection(
        r"(QOS|Assoc)\w*(Node|Cpu|CPU|Mem)\w*",
        "The job asks for more than the QoS {qos} or the account {account} allows.",
        f"Set fewer cpus or less memory in the site file; the limit is shown by: {_QOS_LIMITS}",
    ),
    Rejection(
        r"Job violates accounting/QOS policy",
        "A limit of the QoS {qos} or the account {account} forbids the job.",
        f"Compare the site file with the limits shown by: {_QOS_LIMITS}",
    ),
    Rejection(
        r"Invalid qos specification",
        "The QoS {qos} does not exist, or the account {account} may not use it.",
        f"Set qos in the site file to one that is listed by: {_MY_ASSOCIATIONS}",
    ),
    Rejection(
        r"Invalid account or account/partition combination specified",
        "You may not use the account {account} in the partition {partition}.",
        f"Set account in the site file to one that is listed by: {_MY_ASSOCIATIONS}",
    ),
    Rejection(
        r"[Ii]nvalid partition (name )?specified",
        "There is no partition {partition} on this cluster.",
        "Set partition in the site file to one that is listed by: sinfo --summarize",
    ),
    Rejection(
        r"Requested time limit is invalid",
        "The walltime {walltime} is longer than the partition {partition} allows.",
        f"Set a shorter walltime in the site file; MaxTime is shown by: {_PARTITION_LIMITS}",
    ),
    Rejection(
        r"Memory specification can not be satisfied|Invalid --mem specification",
        "No node of the partition {partition} has {memory} of memory.",
        "Set less memory in the site file; nodes are listed by: "
        "sinfo --partition={partition} --format='%n %m'",
    ),
    Rejection(
        r"More processors requested than permitted|CPU count per node can not be satisfied",
        "No node of the partition {partition} has {cpus} CPUs.",
        "Set fewer cpus in the site file; nodes are listed by: "
        "sinfo --partition={partition} --format='%n %c'",
    ),
    Rejection(
        r"Invalid generic resource \(gres\) specification|Invalid (Trackable RESource|GRES|gres)",
        "This cluster does not know the GPUs as the site file asks for them.",
        "Set gpu-request and gpu-type in the site file after what is listed by: "
        "sinfo --partition={partition} --format='%n %G'",
    ),
    Rejection(
        r"Job dependency problem|[Ii]nvalid job id specified|Invalid dependency",
        "Slurm does not know the job that this one is to follow.",
        "Submit without --after, or name one that is listed by: squeue --me",
    ),
    Rejection(
        r"Invalid job array specification",
        "This cluster takes no such job array: it takes none at all, or none with so high a number.",
        "Look at MaxArraySize (0: no arrays; train each run by itself then, with envbuilder train --sbatch): "
        "scontrol show config",
    ),
    Rejection(
        r"unrecognized option|unrecognised option|Invalid --\S+ specification|Invalid directive|"
        r"Invalid (numeric|time limit) (value|specification)",
        "This cluster's sbatch does not understand an option of the job's script.",
        "Compare the job's section of the site file with what your cluster's manual asks for; see: "
        "sbatch --version",
    ),
    Rejection(
        r"temporarily unable to accept job|Resource temporarily unavailable|MaxJobCount",
        "Slurm holds as many jobs as it can, and takes no further one now.",
        "Try again in some minutes; the queue is shown by: squeue --partition={partition}",
    ),
    Rejection(
        r"Requested node configuration is not available",
        "No node of the partition {partition} has {cpus} CPUs, {memory} and {gpus} GPUs.",
        "Ask for less in the site file; nodes are listed by: "
        "sinfo --partition={partition} --format='%n %c %m %G'",
    ),
    Rejection(
        r"Required (partition|node) not available",
        "The partition {partition} takes no jobs now.",
        "Wait, or set another partition in the site file; their states are listed by: sinfo --summarize",
    ),
    Rejection(
        r"Access/permission denied|User's group not permitted to use this partition",
        "You may not submit to the partition {partition}.",
        f"Set another partition or account in the site file; yours are listed by: {_MY_ASSOCIATIONS}",
    ),
    Rejection(
        r"Unable to contact slurm controller|Zero Bytes were transmitted|Socket timed out|Connection refused",
        "Slurm's controller does not answer.",
        "Try again in some minutes; its state is shown by: scontrol ping",
    ),
    Rejection(
        r"Protocol authentication error|[Mm]unge",
        "Slurm does not accept this machine's credentials.",
        "Run this on a login node; where it is one, tell the cluster's support that munge fails: munge -n",
    ),
)


_PREFIXES = re.compile(r"^(sbatch: )?(error: )?(allocation failure: )?")
"""Of sbatch's lines; the last one is that of --test-only."""


def rejection_error(output: str, spec: JobSpec) -> SlurmError:
    """What `output`, all that sbatch wrote when it refused a job of `spec`, means."""
    said = " ".join(_PREFIXES.sub("", line) for line in output.split("\n")).strip()
    fields = {key: "(default)" if value is None else value for key, value in spec.model_dump().items()}

    def command(text: str) -> str:
        # Where the site names no partition, the commands are about all of them.
        return re.sub(r" (--partition=)?\(default\)", "", text.format_map(fields))

    for rejection in REJECTIONS:
        if re.search(rejection.pattern, output):
            return SlurmError(
                rejection.message.format_map(fields),
                remedy=command(rejection.remedy),
                context={"sbatch": said},
            )
    return SlurmError(
        f"Slurm refused the job: {said or 'sbatch gave no reason'}.",
        remedy=f"Compare the site file with the partition's limits: {command(_PARTITION_LIMITS)}",
        context={"sbatch": said},
    )
