# Trains one epoch by a stage under NVIDIA's profilers, as far as this machine has them.
#   sh kernels/tools/profile.sh check STAGE              says what is missing
#   sh kernels/tools/profile.sh run STAGE [BATCH_SIZE]   needs .venv
# nsys writes a timeline, ncu the counters of the first launches; both into results/profile/STAGE/.
set -eu
cd "$(dirname "$0")/../.."
stage=${2:-} batch_size=${3:-64}
fail() { echo "make profile: $*" >&2; exit 2; }

[ -n "$stage" ] || fail "name a stage: make profile STAGE=tuned [BATCH=64]"
ls /dev/nvidia[0-9]* >/dev/null 2>&1 || fail "no GPU here; nsys and ncu look at a GPU's kernels"

# The path of a profiler: on PATH, or where the toolkit's installers put it.
find_tool() {
  command -v "$1" || ls -d /usr/local/cuda/bin/"$1" /opt/cuda/bin/"$1" \
    /opt/nvidia/nsight-*/*/bin/"$1" /opt/nvidia/nsight-compute/*/"$1" 2>/dev/null | tail -n 1
}
nsys=$(find_tool nsys) || true
ncu=$(find_tool ncu) || true
[ -n "$nsys$ncu" ] || fail "neither nsys nor ncu is on PATH or in /usr/local/cuda/bin; both come with the CUDA toolkit"
[ "$1" = run ] || exit 0

folder=results/profile/$stage
mkdir -p "$folder"
train() {
  "$@" .venv/bin/python -m cnnlib train --stage "$stage" --batch-size "$batch_size" --epochs 1 \
    --out "$folder/weights.npz"
}
train  # compiles the kernels and names a mistake in one line, before a profiler starts
if [ -n "$nsys" ]; then
  train "$nsys" profile --force-overwrite true --output "$folder/timeline"
else
  echo "nsys is not here: no timeline"
fi
if [ -n "$ncu" ]; then
  train "$ncu" --force-overwrite --set full --launch-count 60 --export "$folder/kernels"
else
  echo "ncu is not here: no counters"
fi
ls "$folder"
