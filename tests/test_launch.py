"""Launching on clusters: what would be run is looked at, and the scripts' own logic runs against a pretended gcloud."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TPU = ["--name", "kv", "--zone", "us-east5-b", "--type", "v6e-16"]
SPOT = ["--queued", "--spot", "--tries", "3", "--bucket", "gs://mine/kvjax/"]
COMMAND = ["--", "kvjax", "compare", "--policies", "full; kivi"]

# A TPU is a folder here, a host's home is in it, and a bucket is a folder too. The first TPU is taken away in its run.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
cloud=$CLOUD
echo "$*" >>"$cloud/log"
bucket() { echo "$cloud/bucket/${1#gs://}"; }
here() { case $1 in gs://*) bucket "$1" ;; *) echo "$1" ;; esac; }
case "$1 $2 $3 ${4:-}" in
    "storage ls "*) [[ -d $(bucket "$3") ]] ;;
    "storage rsync "*)
        folders=()
        for word in "${@:3}"; do [[ $word == -* ]] || folders+=("$(here "$word")"); done
        mkdir -p "${folders[1]}"
        cp -r "${folders[0]}/." "${folders[1]}"
        ;;
    "compute tpus queued-resources create") mkdir "$cloud/$5" ;;
    "compute tpus queued-resources describe") echo ACTIVE ;;
    "compute tpus queued-resources delete") rm -rf "${cloud:?}/$5" ;;
    "compute tpus tpu-vm describe")
        [[ -d $cloud/$5 ]] || exit 1
        if [[ -e $cloud/$5/taken ]]; then echo PREEMPTED; else echo READY; fi
        ;;
    "compute tpus tpu-vm scp") cp "$5" "$cloud/kv/kvjax.tar.gz" ;;
    "compute tpus tpu-vm ssh")
        for word in "$@"; do [[ $word != --command=* ]] || command=${word#--command=}; done
        [[ $command != *" install "* ]] || command="${command%% && bash*}"
        cd "$cloud/kv"
        HOME=$PWD KVJAX_ENV=$PWD/env TPU_WORKER_ID=0 bash -c "$command" || status=$?
        if [[ $command == *host.sh* && ! -e $cloud/was_taken ]]; then
            touch "$cloud/was_taken" taken
            exit 255
        fi
        exit "${status:-0}"
        ;;
    *) echo "gcloud does not know: $*" >&2 && exit 64 ;;
esac
"""


def bash(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def commands(script: str, *args: str) -> list[list[str]]:
    """What a dry run prints, in words."""
    done = bash(script, "--dry-run", *args)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text() and os.access(script, os.X_OK)
    done = bash(script.name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: {script.name}")
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_one_tpu():
    where = "--zone=us-east5-b"
    made, packed, copied, installed, ran, folder, back, deleted = commands("tpu.sh", *TPU, *COMMAND)
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert made == [*tpu, "create", "kv", "--version=v2-alpha-tpuv6e", "--accelerator-type=v6e-16", where]
    archive = packed[-2].removeprefix("--output=")
    assert packed[0] == "git" and copied == [*tpu, "scp", archive, "kv:kvjax.tar.gz", "--worker=all", where]
    assert installed[:5] == ran[:5] == [*tpu, "ssh"] and "--worker=all" in installed and "--worker=all" in ran
    assert installed[-2].endswith("&& bash kvjax/scripts/launch/host.sh install tpu")
    on_host = shlex.split(ran[-2].removeprefix("--command="))
    assert on_host == ["bash", "kvjax/scripts/launch/host.sh", "run", "--results", "results", *COMMAND]
    assert folder[0] == "mkdir" and back[:6] == [*tpu, "scp", "kv:kvjax/results/*"] and "--worker=0" in back
    assert deleted == [*tpu, "delete", "kv", "--quiet", where]


def test_a_spot_tpu_from_the_queue():
    made, *_, ran, _, back, deleted = commands("tpu.sh", *TPU, *SPOT, "--project", "mine", *COMMAND)
    queue = ["gcloud", "compute", "tpus", "queued-resources"]
    where = ["--zone=us-east5-b", "--project=mine"]
    assert made == [
        *queue,
        *("create", "kv", "--node-id=kv", "--runtime-version=v2-alpha-tpuv6e", "--accelerator-type=v6e-16", "--spot"),
        *where,
    ]
    assert "--bucket gs://mine/kvjax/ --" in ran[-3]
    assert back[:5] == ["gcloud", "storage", "rsync", "--recursive", "gs://mine/kvjax"]
    assert deleted == [*queue, "delete", "kv", "--force", "--quiet", *where]
    assert not any("delete" in words for words in commands("tpu.sh", *TPU, *SPOT, "--keep", *COMMAND))


def test_xpk():
    (create,) = commands("xpk.sh", "--name", "kv", "--cluster", "tpus", "--type", "v5litepod-16", *COMMAND)
    assert create[:3] == ["xpk", "workload", "create"]
    assert {"--workload=kv", "--cluster=tpus", "--tpu-type=v5litepod-16", "--num-slices=1"} < set(create)
    install, run = next(word for word in create if word.startswith("--command=")).split(" && ")
    assert install == "--command=bash scripts/launch/host.sh install tpu"
    assert shlex.split(run) == ["bash", "scripts/launch/host.sh", "run", *COMMAND]


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("tpu.sh", ["--name", "kv", *COMMAND], "--zone is missing"),
        ("tpu.sh", TPU, "no command given"),
        ("tpu.sh", [*TPU, "--spot", *COMMAND], "a TPU that is taken away takes its disk along"),
        ("tpu.sh", [*TPU, "--tries", "0", *COMMAND], "--tries is a number from 1, got 0"),
        ("tpu.sh", [*TPU, "--bucket", "mine", *COMMAND], "--bucket is gs://BUCKET/FOLDER, got mine"),
        ("tpu.sh", [*TPU, "--results", "/tmp", *COMMAND], "--results is a folder inside the checkout"),
        ("tpu.sh", [*TPU, "--fast", *COMMAND], "unknown argument --fast"),
        ("tpu.sh", [*TPU[:4], "--type", "v9-8", *COMMAND], "no default software version for v9-8"),
        ("tpu.sh", ["--name", "Kv", *TPU[2:], *COMMAND], "--name takes lower-case letters"),
        ("tpu.sh", [*TPU, "--zone"], "--zone needs a value"),
        ("xpk.sh", ["--name", "kv", *COMMAND], "--cluster is missing"),
        (
            "xpk.sh",
            ["--name", "kv", "--cluster", "c", "--type", "t", "--slices", "x", *COMMAND],
            "--slices is a number",
        ),
        ("host.sh", ["run", "kvjax"], "run does not know kvjax"),
        ("host.sh", ["run", "--bucket", "b", "--", "ls"], "--bucket is gs://"),
        ("host.sh", ["install", "abacus"], "install takes tpu, gpu or cpu"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(script, args, words):
    done = bash(script, *args)
    assert (done.returncode, done.stdout) == (2, "") and f"error: {words}" in done.stderr


def test_a_host_runs_a_command_in_the_checkout():
    done = bash("host.sh", "run", "--", "bash", "-c", "pwd; exit 3", KVJAX_ENV="/none")
    assert (done.returncode, done.stdout.strip()) == (3, str(LAUNCH.parents[1]))


def test_a_tpu_that_is_taken_away_goes_on_from_the_bucket(tmp_path):
    """The first has counted to 1 when it goes, the second finds that and counts on."""
    (tmp_path / "bin").mkdir()
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    shutil.copytree(LAUNCH, checkout / "scripts" / "launch")
    who = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    subprocess.run(["git", "-C", str(checkout), "add", "."], check=True)
    subprocess.run(["git", "-C", str(checkout), *who, "commit", "-qm", "All"], check=True)
    count = "mkdir -p results; echo $(($(cat results/n 2>/dev/null || echo 0) + 1)) > results/n"
    done = subprocess.run(
        ["bash", str(checkout / "scripts/launch/tpu.sh"), *TPU, *SPOT, "--", "bash", "-c", count],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PATH": f"{gcloud.parent}:{os.environ['PATH']}", "CLOUD": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "Try 1 of 3: the TPU is PREEMPTED." in done.stderr
    assert (checkout / "results" / "n").read_text() == "2\n" and not (tmp_path / "kv").exists()


def test_sky():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    subprocess.run(["bash", "-n"], input=f"{task['setup']}\n{task['run']}", text=True, check=True)
    assert task["file_mounts"]["~/results"] == {"name": "${BUCKET}", "mode": "MOUNT"}
    assert {"BUCKET", "COMMAND", "EXTRA"} == task["envs"].keys()
