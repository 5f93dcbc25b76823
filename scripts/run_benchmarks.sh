#!/usr/bin/env bash
# Run the benchmark lessons and collect their tables and pictures in models/benchmarks/.
# With a GPU, the largest sizes are measured; a CPU alone would need hours for them.
set -euo pipefail
cd "$(dirname "$0")/.."

matrices=()
networks=()
if nvidia-smi >/dev/null 2>&1; then
    matrices=(--matrix-size 8192 --iterations 100)
    networks=(--model-name resnet50 --batch-sizes 1,8,16,32)
fi
folder=models/benchmarks/$(date +%Y-%m-%d_%H%M%S)
mkdir -p "$folder"

run() {
    local name=$1
    shift
    echo "== $name $*"
    uv run "src/advanced/$name.py" "$@" | tee "$folder/$name.txt"
    if [ -e "models/plots/advanced-$name.png" ]; then
        cp "models/plots/advanced-$name.png" "$folder"
    fi
}

run 04_gpu_vs_cpu_benchmark ${matrices[@]+"${matrices[@]}"}
run 05_wrong_timings
run 06_memory_management --batch-sizes 16,32,64,128
run 07_inference_comparison ${networks[@]+"${networks[@]}"}
run 08_latency_and_memory
echo "Tables and pictures: $folder"
