#!/usr/bin/env bash
# Measures pe_patch on one GPU, in at most 8 minutes, and writes at most 16 MiB of results into a folder.
#
#     benchmarks/gpu.sh DIR                # on a machine with CUDA
#     benchmarks/gpu.sh DIR --rehearse     # every step at toy size on a CPU, about 4 minutes
#
# Each step writes DIR/STEP.log, and DIR/STEP.done when it succeeded. A second call skips the steps that are done, and
# tries the others again. Nothing is downloaded. SmolLM2 must lie in build/real/models/smollm2 (get_models.py there);
# without it, its steps are left out and the summary says so. Set PYTHON to the interpreter (default: .venv/bin/python).
set -u
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "Usage: benchmarks/gpu.sh DIR [--rehearse]" >&2
    exit 2
fi
out=$1
rehearse=${2:-}
if [ -n "$rehearse" ] && [ "$rehearse" != --rehearse ]; then
    echo "Unknown option $rehearse. The only one is --rehearse." >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
model=build/real/models/smollm2
export HF_HUB_OFFLINE=1
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

if [ -z "$rehearse" ]; then
    device=cuda
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "There is no CUDA device. --rehearse runs every step at toy size on a CPU." >&2
        exit 1
    }
else
    device=cpu
fi

# step NAME SECONDS COMMAND...: run a command once, with a limit on its time
step() {
    local name=$1 limit=$2
    shift 2
    if [ -e "$out/$name.done" ]; then
        echo "$name: done before"
        return
    fi
    local start=$SECONDS
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        echo "$name: $((SECONDS - start)) s" | tee "$out/$name.done"
    else
        echo "$name: failed with status $? after $((SECONDS - start)) s; see $out/$name.log"
        failed=1
    fi
}

record_machine() {
    "$python" -c 'import json, sys; sys.path.append("benchmarks"); from measure import machine; print(json.dumps(machine()))'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null || true
}

tests() {
    local chosen=()
    [ -z "$rehearse" ] || chosen=(-k "yarn or alibi")
    PE_PATCH_DEVICE=$device "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider "${chosen[@]}"
}

attention() {
    if [ -z "$rehearse" ]; then
        "$python" benchmarks/attention.py --device cuda --dtype bfloat16 --backends sdpa flex --lengths 8192 32768 131072 \
            --schemes rope alibi self_extend --rounds 1 --name "$out/attention"
    else
        "$python" benchmarks/attention.py --lengths 1024 --schemes rope alibi --rounds 1 --name "$out/attention"
    fi
}

decode() {
    local size=(--lengths 8192 32768 131072 --batch 1 8 --rounds 7)
    local schemes=(rope dynamic_ntk self_extend dca xpos alibi)
    [ -z "$rehearse" ] || size=(--lengths 512 --rounds 2)
    "$python" benchmarks/decode.py --device "$device" "${size[@]}" --schemes "${schemes[@]}" --output "$out"
}

generate() {
    local size=(--model "$model" --prompt 8192 --tokens 129)
    [ -z "$rehearse" ] || size=(--model demo --prompt 256 --tokens 9)
    "$python" benchmarks/generate.py --device "$device" "${size[@]}" --output "$out"
}

evaluate() { # NAME MODEL [OPTIONS]
    local name=$1 subject=$2
    shift 2
    local size=(--length 8192 32768 --samples 10 --control-length 2048)
    [ -z "$rehearse" ] || size=(--length 512 --samples 2 --control-length 256)
    "$python" -m pe_patch evaluate "$subject" --device "$device" --task passkey --task perplexity "${size[@]}" \
        --beyond-window "$@" --output "$out/$name"
}

finetune() {
    local subject=$model size=(phases.0.steps=20 phases.0.length=8192)
    [ -z "$rehearse" ] || { subject=demo size=(phases.0.steps=2 phases.0.length=512); }
    "$python" -m pe_patch train yarn_llama_32k "model.source=$subject" "output=$out/finetuned" data.source=stdlib \
        scheme.options.factor=4 phases.0.batch=4 phases.0.micro_batch=1 phases.0.warmup=1 "${size[@]}" \
        evaluation.every=null 'evaluation.lengths=[256]' overwrite=true
    rm -rf "$out/finetuned/checkpoints"
}

memory() {
    local subject=$model size=(--lengths 8192 32768)
    [ -d "$model" ] || subject=small
    [ -z "$rehearse" ] || { subject=small size=(--lengths 512); }
    "$python" benchmarks/memory.py --device "$device" --model "$subject" "${size[@]}" --output "$out"
}

fsdp2() {
    local command=(-m pe_patch.training tiny_yarn "output=$out/fsdp2" phases.0.steps=2 overwrite=true)
    if [ -z "$rehearse" ]; then
        "$python" -m accelerate.commands.launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 1 "${command[@]}"
    else
        "$python" -m accelerate.commands.launch --config_file recipes/accelerate/cpu_ddp.yaml --num_processes 1 "${command[@]}"
    fi
    rm -rf "$out/fsdp2/model" "$out/fsdp2/checkpoints"
}

clean() { # weights are too large to keep
    find "$out" \( -name '*.safetensors' -o -name '*.bin' -o -name '*.pt' \) -delete
}

export -f record_machine tests attention decode generate evaluate finetune memory fsdp2
export python model device rehearse out
run() { bash -c "$(declare -f "$1"); $*"; }
export -f run

step machine 60 bash -c record_machine
step tests 240 bash -c tests
step attention 120 bash -c attention
step decode 120 bash -c decode
subject=$model
[ -z "$rehearse" ] || subject=demo
if [ -n "$rehearse" ] || [ -d "$model" ]; then
    step generate 120 bash -c generate
    step before_training 120 bash -c "evaluate before_training $subject --scheme yarn --factor 4"
    step finetune 180 bash -c finetune
    [ ! -e "$out/finetune.done" ] || step after_training 120 bash -c "evaluate after_training '$out/finetuned/model'"
else
    echo "generate, before_training, finetune, after_training: left out, since $model is missing"
fi
step memory 120 bash -c memory
step fsdp2 120 bash -c fsdp2
[ "$failed" = 1 ] || clean
echo "$(du -sh "$out" | cut -f1) in $out after $SECONDS s"
exit $failed
