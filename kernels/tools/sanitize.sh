# compute-sanitizer over every GPU stage on a small network; says so where there is no GPU.
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
echo "sweep: {stages: [gemm_cuda, fused, ring, tuned], device: cuda}" >"$config"
for tool in memcheck racecheck; do
  echo "compute-sanitizer --tool $tool"
  "$sanitizer" --tool $tool --target-processes all --error-exitcode 1 \
    .venv/bin/python -m cnnlib check --config config.yaml --config tests/tiny.yaml --config "$config"
done
