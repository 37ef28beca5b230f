#!/usr/bin/env bash
# Runs a command on Cloud TPU VMs, one host or a pod slice, and brings the results back.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: tpu.sh --name NAME --zone ZONE --type TYPE [options] -- COMMAND...

Makes a TPU, or takes the one of that name, installs kvjax from this checkout's last commit on all its hosts, runs the
command on all of them at once, copies the results here and deletes the TPU if it has made it.

  --name NAME        Of the TPU.
  --zone ZONE        Such as us-central1-a.
  --type TYPE        Accelerator type: v5litepod-8, v6e-16, v5p-8, v4-32, ...
  --runtime VERSION  TPU software version. Default: the one for the type.
  --project PROJECT  Default: gcloud's.
  --queued           Wait in the queue until there is one (queued resources).
  --spot             Cheaper, and may be taken away at any time; needs --bucket.
  --bucket URL       gs://BUCKET/FOLDER where results are kept while the command runs; it goes on from what is there.
  --tries N          Start again so many times in all if the TPU is taken away. Default: 1; needs --bucket.
  --results DIR      Where the command writes, relative to the checkout, and where results go here. Default: results.
  --keep             Do not delete the TPU in the end.
  --dry-run          Print the commands and run none.
  --help             This.

Examples:
  tpu.sh --name kv --zone us-west4-a --type v5litepod-8 -- kvjax compare --policies "full; kivi" --out results/kivi
  tpu.sh --name kv --zone us-east5-b --type v6e-16 --queued --spot --tries 5 --bucket gs://mine/kvjax -- \
      kvjax bench kernels --json results/kernels.json
EOF
}

die() {
    echo "error: $*" >&2
    exit 2
}

# The TPU software that JAX needs: https://cloud.google.com/tpu/docs/runtimes
default_runtime() {
    case $1 in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
        *) die "no default software version for $1; give --runtime, see https://cloud.google.com/tpu/docs/runtimes" ;;
    esac
}

name="" zone="" type="" runtime="" project="" bucket="" results=results tries=1
queued=false spot=false keep=false dry_run=false
while (($#)); do
    case $1 in
        --name | --zone | --type | --runtime | --project | --bucket | --results | --tries)
            (($# > 1)) || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --queued | --spot | --keep | --dry-run)
            option=${1#--}
            printf -v "${option//-/_}" true
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
for option in name zone type; do
    [[ -n ${!option} ]] || die "--$option is missing; see --help"
done
(($#)) || die "no command given; it comes after --"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name takes lower-case letters, digits and dashes, got $name"
[[ $tries =~ ^[1-9][0-9]*$ ]] || die "--tries is a number from 1, got $tries"
[[ $results != /* && $results != *..* ]] || die "--results is a folder inside the checkout, got $results"
[[ -z $bucket || $bucket == gs://?* ]] || die "--bucket is gs://BUCKET/FOLDER, got $bucket"
if [[ -z $bucket ]] && { $spot || ((tries > 1)); }; then
    die "a TPU that is taken away takes its disk along: --spot and --tries need --bucket"
fi
[[ -n $runtime ]] || runtime=$(default_runtime "$type")

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
on_host=(bash kvjax/scripts/launch/host.sh run --results "$results")
[[ -z $bucket ]] || on_host+=(--bucket "$bucket")
on_host+=(-- "$@")

run() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

tpu() { run gcloud compute tpus tpu-vm "$1" "${@:2}" "${where[@]}"; }

on_all_hosts() { tpu ssh "$name" --worker=all --command="$1"; }

# READY, PREEMPTED, ...; MISSING if there is none.
state() {
    $dry_run && echo MISSING && return
    gcloud compute tpus tpu-vm describe "$name" --format='value(state)' "${where[@]}" 2>/dev/null || echo MISSING
}

make() {
    local options=(--accelerator-type="$type")
    $spot && options+=(--spot)
    if ! $queued; then
        tpu create "$name" --version="$runtime" "${options[@]}"
        return
    fi
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --runtime-version="$runtime" \
        "${options[@]}" "${where[@]}"
    while ! $dry_run; do
        local queue
        queue=$(gcloud compute tpus queued-resources describe "$name" --format='value(state.state)' "${where[@]}")
        echo "$(date +%T) $queue"
        case $queue in
            ACTIVE) break ;;
            FAILED | SUSPENDED | SUSPENDING) die "the queued resource $name is $queue" ;;
        esac
        sleep 30
    done
}

remove() {
    if $queued; then
        run gcloud compute tpus queued-resources delete "$name" --force --quiet "${where[@]}"
    else
        tpu delete "$name" --quiet
    fi
}

install() {
    local archive=$scratch/kvjax.tar.gz
    git -C "$root" diff --quiet HEAD || echo "Changes that are not committed stay here." >&2
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$name:kvjax.tar.gz" --worker=all
    on_all_hosts "mkdir -p kvjax && tar -xzf kvjax.tar.gz -C kvjax && bash kvjax/scripts/launch/host.sh install tpu"
}

bring_back() {
    run mkdir -p "$root/$results"
    if [[ -n $bucket ]]; then
        run gcloud storage rsync --recursive "${bucket%/}" "$root/$results"
    else
        tpu scp "$name:kvjax/$results/*" "$root/$results" --recurse --worker=0
    fi
}

attempt() {
    [[ $(state) != MISSING ]] || make
    install
    on_all_hosts "$(printf '%q ' "${on_host[@]}")"
}

[[ $(state) == MISSING ]] || keep=true # Somebody else's.
for ((try = 1; try <= tries; try++)); do
    # In a subshell, and not as a condition, where `set -e` would not hold.
    set +e
    (
        set -e
        attempt
    )
    status=$?
    set -e
    ((status != 0)) || break
    now=$(state)
    [[ $now != READY ]] || break # The command itself has failed.
    echo "Try $try of $tries: the TPU is $now." >&2
    ((try == tries)) || [[ $now == MISSING ]] || remove
done
if [[ -n $bucket || $status == 0 ]]; then
    bring_back
fi
if ! $keep && { $dry_run || [[ $(state) != MISSING ]]; }; then
    remove
fi
exit "$status"
