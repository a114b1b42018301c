#!/usr/bin/env bash
# Train on FineWeb within a limited disk.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: ./run_fineweb_limited.sh --shards PATTERN [--config FILE] [--workers N] [--prefetch N] [--max-disk GB]

  --config FILE     configuration                      [configs/model-config-80m-fineweb.yaml]
  --shards PATTERN  shards, quoted; several times for several patterns
  --workers N       tokenizer processes, or auto       [4]
  --prefetch N      shards each lane may fetch ahead   [2]
  --max-disk GB     hard budget in GB (10^9 bytes)     [35]

  ./run_fineweb_limited.sh --shards 's3://my-bucket/fineweb/shard-{00000..01000}.tar.bz2'
EOF
}

root=$(cd "$(dirname "$0")" && pwd)
config=$root/configs/model-config-80m-fineweb.yaml
workers=4 prefetch=2 max_disk=35 shards=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --config | --shards | --workers | --prefetch | --max-disk)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;
        *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    case $1 in
        --config) config=$2 ;;
        --shards) shards+=(--shards "$2") ;;
        --workers) workers=$2 ;;
        --prefetch) prefetch=$2 ;;
        --max-disk) max_disk=$2 ;;
    esac
    shift 2
done
[ ${#shards[@]} -gt 0 ] || { echo "error: --shards is missing" >&2; usage >&2; exit 2; }
exec "$root/bin/fineweb-pipeline" start --config "$config" "${shards[@]}" \
    --workers "$workers" --prefetch "$prefetch" --max-disk "$max_disk"
