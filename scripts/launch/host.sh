#!/usr/bin/env bash
# On a host: installs kvjax from the checkout that this script is in, and runs a command so that it may be cut off.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: host.sh install [tpu|gpu|cpu]
       host.sh run [--bucket gs://BUCKET/FOLDER] [--results DIR] [--every SECONDS] -- COMMAND...

install  Makes a virtual environment with kvjax in it: $KVJAX_ENV, by default ~/kvjax-env.
run      Runs a command in it, in the checkout. With a bucket, the results of earlier runs are fetched first, and what
         is in DIR (default: results) goes to the bucket every 30 seconds and at the end; the first of several hosts
         does that. A run that was cut off goes on from there.
EOF
}

die() {
    echo "error: $*" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
environment=${KVJAX_ENV:-$HOME/kvjax-env}

install() {
    local extra=${1:-tpu}
    case $extra in
        tpu | gpu) extra="[$extra]" ;;
        cpu) extra="" ;;
        *) die "install takes tpu, gpu or cpu, got $extra" ;;
    esac
    # The system's Python is often older than what kvjax needs; uv then brings one.
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
        python3 -m pip install --quiet --user --break-system-packages uv
    [[ -x $environment/bin/python ]] || uv venv --quiet --python '>=3.11,<3.13' "$environment"
    uv pip install --quiet --python "$environment/bin/python" -c "$root/constraints.txt" -e "$root$extra"
    "$environment/bin/kvjax" --help >/dev/null
    echo "kvjax is installed in $environment"
}

# Number of this host among those of its program.
host_index() {
    local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
    if [[ -n ${KVJAX_PROCESS_INDEX:-} ]]; then
        echo "$KVJAX_PROCESS_INDEX"
    elif [[ -n ${TPU_WORKER_ID:-} ]]; then
        echo "$TPU_WORKER_ID"
    else
        curl --silent --fail --max-time 5 -H "Metadata-Flavor: Google" "$url" || echo 0
    fi
}

push() {
    [[ ! -d $results ]] || gcloud storage rsync --recursive --quiet --exclude='.*\.partial$' "$results" "$bucket"
}

pull() {
    mkdir -p "$results"
    # A folder that nothing was ever written to does not exist.
    if gcloud storage ls "$bucket/" >/dev/null 2>&1; then
        gcloud storage rsync --recursive --quiet "$bucket" "$results"
    fi
}

push_always() {
    while sleep "$every"; do
        push || echo "The bucket could not be reached; trying again in $every s." >&2
    done
}

run() {
    bucket="" results=results every=30
    while (($#)); do
        case $1 in
            --bucket | --results | --every)
                (($# > 1)) || die "$1 needs a value"
                printf -v "${1#--}" %s "$2"
                shift 2
                ;;
            --)
                shift
                break
                ;;
            *) die "run does not know $1; the command comes after --" ;;
        esac
    done
    (($#)) || die "no command given; it comes after --"
    [[ -z $bucket || $bucket == gs://?* ]] || die "--bucket is gs://BUCKET/FOLDER, got $bucket"
    [[ $every =~ ^[1-9][0-9]*$ ]] || die "--every is a number of seconds, got $every"
    bucket=${bucket%/}

    cd "$root"
    export PATH=$environment/bin:$PATH
    local pushing="" status=0
    if [[ -n $bucket ]]; then
        pull
        if [[ $(host_index) == 0 ]]; then
            push_always &
            pushing=$!
        fi
    fi
    "$@" || status=$?
    if [[ -n $pushing ]]; then
        kill "$pushing" 2>/dev/null || true
        push
    fi
    return "$status"
}

case ${1:-} in
    install | run)
        "$@"
        ;;
    -h | --help)
        usage
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
