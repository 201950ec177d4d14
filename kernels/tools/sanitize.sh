# compute-sanitizer over every GPU stage on a small network, and over those that serve any layer on
# another; says so where there is no GPU.
#   sh kernels/tools/sanitize.sh
set -eu
cd "$(dirname "$0")/../.."
if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1; then
  echo "no GPU here: compute-sanitizer is left out"
  exit 0
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || {
  echo "make sanitize: compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin; it comes with the CUDA toolkit" >&2
  exit 2
}
config=$(mktemp)
trap 'rm -f "$config"' EXIT
general='
networks:
  general:
    - conv: {maps: 3, kernel: [3, 2], stride: [1, 2], padding: [2, 1]}
    - activation: gelu
    - subsample: {size: 3, stride: 2, padding: 1}
    - dropout: 0.25
    - dense: 3
'
for sweep in \
  '{networks: [tiny], stages: [gemm_cuda, fused, ring, tuned], device: cuda}' \
  '{networks: [general], stages: [gemm_cuda], device: cuda}'; do
  printf '%s\nsweep: %s\n' "$general" "$sweep" >"$config"
  for tool in memcheck racecheck; do
    echo "compute-sanitizer --tool $tool: $sweep"
    "$sanitizer" --tool $tool --target-processes all --error-exitcode 1 \
      .venv/bin/python -m cnnlib check --config config.yaml --config tests/tiny.yaml --config "$config"
  done
done
