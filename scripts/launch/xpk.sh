#!/usr/bin/env bash
# Runs a command on a GKE cluster of TPUs through XPK (https://github.com/AI-Hypercomputer/xpk), which queues it,
# starts it on all hosts of all slices, and starts it again when machines are taken away.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: xpk.sh --name NAME --cluster CLUSTER --type TYPE [options] -- COMMAND...

  --name NAME        Of the workload.
  --cluster CLUSTER  Made by `xpk cluster create`.
  --type TYPE        TPU type: v5litepod-16, v6e-256, v5p-128, ...
  --slices N         Slices of this type. Default: 1.
  --zone ZONE        Of the cluster. --project PROJECT likewise. Default: gcloud's.
  --storage NAME     A bucket that `xpk storage attach NAME --type=gcsfuse` has mounted in the cluster; results belong
                     below its mount point, such as `--out /results/mine`, from where a run goes on.
  --restarts N       Start again so many times. Default: 10.
  --image IMAGE      Base image with Python 3.11 or newer. Default: python:3.12.
  --dry-run          Print the command and do not run it.
  --help             This.

Example:
  xpk.sh --name kv --cluster tpus --type v5litepod-16 --storage results -- \
      kvjax compare --policies "full; kivi" --out /results/kivi
EOF
}

die() {
    echo "error: $*" >&2
    exit 2
}

name="" cluster="" type="" slices=1 zone="" project="" storage="" restarts=10 image=python:3.12 dry_run=false
while (($#)); do
    case $1 in
        --name | --cluster | --type | --slices | --zone | --project | --storage | --restarts | --image)
            (($# > 1)) || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --dry-run)
            dry_run=true
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        --)
            shift
            break
            ;;
        *) die "unknown argument $1; see --help" ;;
    esac
done
for option in name cluster type; do
    [[ -n ${!option} ]] || die "--$option is missing; see --help"
done
(($#)) || die "no command given; it comes after --"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices is a number from 1, got $slices"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts is a number, got $restarts"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# XPK copies the checkout into the image and runs this there, on every host.
command="bash scripts/launch/host.sh install tpu && bash scripts/launch/host.sh run --$(printf ' %q' "$@")"
create=(
    xpk workload create
    --workload="$name" --cluster="$cluster" --tpu-type="$type" --num-slices="$slices"
    --base-docker-image="$image" --script-dir="$root" --max-restarts="$restarts"
    --command="$command"
)
[[ -z $zone ]] || create+=(--zone="$zone")
[[ -z $project ]] || create+=(--project="$project")
[[ -z $storage ]] || create+=(--storage="$storage")
if $dry_run; then
    printf '%q ' "${create[@]}"
    echo
else
    "${create[@]}"
fi
