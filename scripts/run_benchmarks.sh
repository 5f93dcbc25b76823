#!/usr/bin/env bash
# Run the benchmark lessons and collect their tables and pictures under models/benchmarks/.
# With a GPU they get the notes' arguments; a CPU would need hours for those.
set -euo pipefail
cd "$(dirname "$0")/.."

matrices=() networks=()
if nvidia-smi >/dev/null 2>&1; then
    matrices=(--matrix-size 8192 --iterations 100)
    networks=(--model-name resnet50 --batch-sizes 1,8,16,32)
else
    echo "No GPU: 04 and 06 choose sizes that a CPU can finish."
fi

folder=models/benchmarks/$(date +%Y-%m-%d_%H%M%S)
mkdir -p "$folder"

run() {
    local name=$1
    shift
    echo "== $name $*"
    uv run "src/advanced/$name.py" "$@" | tee "$folder/$name.txt"
    if [ -e "models/plots/$name.png" ]; then cp "models/plots/$name.png" "$folder"; fi
}

run 04_gpu_vs_cpu_benchmark ${matrices[@]+"${matrices[@]}"}
run 17_where_a_gpu_pays
run 05_memory_management --batch-sizes 16,32,64,128
run 06_inference_comparison ${networks[@]+"${networks[@]}"}
run 11_inference_engines
run 19_latency_and_memory
echo "Tables and pictures: $folder"
