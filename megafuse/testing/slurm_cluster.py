"""A real Slurm of four nodes on one machine, for tests: munged, slurmctld, and a slurmd a node, each in a network
namespace of its own with its own host name, file systems and (device files that stand for) eight GPUs.

Needs root and Debian's packages slurmctld, slurmd, slurm-client, munge and iproute2. Nothing under /etc, /run or the
system's own Slurm is touched, except the network namespaces and the bridge, which `stop` removes.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NODES = 4
GPUS = 8
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "nsenter", "unshare")

_CONFIG = """
ClusterName=megafuse
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job may not start again before cred_expire (120 s where it is not set)
AuthInfo=socket={lab}/munge/socket,cred_expire=5
StateSaveLocation={lab}/state
SlurmctldPidFile={lab}/slurmctld.pid
SlurmctldLogFile={lab}/log/slurmctld.log
SlurmdSpoolDir={lab}/spool/%n
SlurmdPidFile={lab}/slurmd-%n.pid
SlurmdLogFile={lab}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
ReturnToService=2
MinJobAge=86400
InactiveLimit=0
KillWait=30
MessageTimeout=30
BatchStartTimeout=30
SlurmdTimeout=10
UnkillableStepTimeout=60
"""


class NoSlurm(Exception):
    """A real Slurm cannot run here, and why."""


class SlurmCluster:
    """`start`, `submit`, look, `kill_node`, `stop`. `folder` is created, and is the cluster's only place on disk."""

    def __init__(self, folder: Path) -> None:
        self.lab = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._tag = f"mf{os.getpid() % 100000}"
        self._net = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"

    def start(self) -> None:
        """Raise NoSlurm where it cannot be; return when every node is idle."""
        if os.geteuid() != 0:
            raise NoSlurm("not root: nodes need network namespaces")
        if missing := [name for name in PROGRAMS if not shutil.which(name)]:
            raise NoSlurm(
                f"{', '.join(missing)} not found: apt-get install slurmctld slurmd slurm-client munge iproute2"
            )
        if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode:
            raise NoSlurm("namespaces are not allowed here")
        for name in ("log", "state", "munge", "spool", "dev", "local"):
            (self.lab / name).mkdir(parents=True, mode=0o755)
        try:
            self._network()
            self._configure()
            self._munge()
            self._spawn("slurmctld", ["slurmctld", "-D"])
            for node in range(1, NODES + 1):
                self.start_node(f"node{node}")
            self.wait(self._all_idle, 60, "all nodes idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every daemon and job, and remove the network."""
        jobs = self._run("squeue", "-h", "-o", "%A").split() if "slurmctld" in self._daemons else []
        if jobs:
            self._run("scancel", *jobs)
            with contextlib.suppress(TimeoutError):
                self.wait(lambda: not self._run("squeue", "-h"), 20, "no jobs")
        for node in range(1, NODES + 1):
            self.kill_node(f"node{node}")
            subprocess.run(["ip", "netns", "del", f"{self._tag}-node{node}"], capture_output=True)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True)

    def submit(self, script: Path | str, *args: str, options: Sequence[str], env: Mapping[str, str], cwd: Path) -> str:
        """sbatch; returns the job id. Raises CalledProcessError."""
        line = ["sbatch", "--parsable", *options, str(script), *args]
        done = subprocess.run(
            line, env={**self.environment, **env}, cwd=cwd, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, of the first of an array's tasks; empty where there is none."""
        found = re.search(rf"(?:^|\s){name}=(\S*)", self._run("scontrol", "-o", "show", "job", job))
        return found[1] if found else ""

    def comment(self, job: str) -> str:
        """The comment of a job, the last one where it has ended; empty where there is none."""
        return self._run("squeue", "-h", "-t", "all", "-j", job, "-o", "%k").strip().removeprefix("(null)")

    def wait_state(self, job: str, states: str, seconds: float) -> str:
        """Wait until the job is in one of `states` (A|B); returns it."""
        self.wait(lambda: self.field(job, "JobState") in states.split("|"), seconds, f"job {job} {states}")
        return self.field(job, "JobState")

    @property
    def gateway(self) -> str:
        """This machine's address, as nodes see it."""
        return f"{self._net}.1"

    def signal_batch(self, job: str, name: str) -> None:
        """What Slurm does before the time limit, by --signal=B:NAME."""
        self._run("scancel", "--batch", f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        """scancel."""
        self._run("scancel", job)

    def nodes_of(self, job: str) -> list[str]:
        """Node names of a running job, the batch host first."""
        return self._run("scontrol", "show", "hostnames", self.field(job, "NodeList")).split()

    def processes(self, node: str) -> list[int]:
        """Everything that runs on a node."""
        done = subprocess.run(["ip", "netns", "pids", f"{self._tag}-{node}"], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def kill_node(self, node: str) -> None:
        """End everything on a node at once, its slurmd included."""
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        if daemon := self._daemons.pop(node, None):
            daemon.kill()
            daemon.wait()

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        # private on the node: its name, its /etc/hosts, and a file system that no other node sees
        inside = (
            f"mount --bind {self.lab}/hosts /etc/hosts; mount -t tmpfs local {self.lab}/local; hostname {node}; "
            f"exec slurmd -D -N {node}"
        )
        enter = ["nsenter", f"--net=/run/netns/{self._tag}-{node}", "unshare", "--uts", "--mount"]
        self._spawn(node, [*enter, "--propagation", "slave", "sh", "-c", inside])

    @staticmethod
    def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
        """Poll until the condition holds. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.2)

    def _all_idle(self) -> bool:
        return self._run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * NODES

    def _run(self, *line: str) -> str:
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout

    def _spawn(self, name: str, line: list[str]) -> None:
        with open(self.lab / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                line, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.lab, start_new_session=True,
            )  # fmt: skip

    def _network(self) -> None:
        def ip(*words: str) -> None:
            done = subprocess.run(["ip", *words], capture_output=True, text=True)
            if done.returncode:
                raise NoSlurm(f"ip {' '.join(words)}: {done.stderr.strip()}")

        ip("link", "add", self._tag, "type", "bridge")
        ip("addr", "add", f"{self._net}.1/24", "dev", self._tag)
        ip("link", "set", self._tag, "up")
        hosts = ["127.0.0.1 localhost", f"{self._net}.1 {socket.gethostname().split('.')[0]}"]
        for node in range(1, NODES + 1):
            space, cable = f"{self._tag}-node{node}", f"{self._tag}n{node}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", self._tag, "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "addr", "add", f"{self._net}.{10 + node}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            hosts.append(f"{self._net}.{10 + node} node{node}")
        (self.lab / "hosts").write_text("\n".join(hosts) + "\n")

    def _configure(self) -> None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        text = _CONFIG.format(host=socket.gethostname().split(".")[0], net=self._net, port=port, lab=self.lab)
        for node in range(1, NODES + 1):
            text += f"NodeName=node{node} NodeAddr={self._net}.{10 + node} NodeHostname=node{node} Port={port} CPUs=16 "
            text += (
                f"Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:{GPUS}\n"
            )
        text += f"PartitionName=gpu Nodes=node[1-{NODES}] Default=YES MaxTime=INFINITE State=UP\n"
        (self.lab / "slurm.conf").write_text(text)
        # slurmd wants character devices whose digits become CUDA_VISIBLE_DEVICES; nobody opens them
        devices = [self.lab / "dev" / f"nvidia{gpu}" for gpu in range(GPUS)]
        for device in devices:
            os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))
        (self.lab / "gres.conf").write_text(
            f"NodeName=node[1-{NODES}] Name=gpu File={self.lab}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        (self.lab / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")

    def _munge(self) -> None:
        folder = self.lab / "munge"
        folder.chmod(0o711)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._spawn("munged", ["munged", "--foreground", "--force", *(f"--{k}={folder / v}" for k, v in files.items())])
        self.wait((folder / "socket").exists, 20, "munge's socket")
