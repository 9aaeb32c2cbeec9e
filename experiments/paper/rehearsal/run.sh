#!/bin/bash
# The paper's scalability study at a toy size, from nothing to its figure: `make paper-rehearsal`, minutes on two cores.
# The same sweep file as on a cluster, with an overlay for each model, two processes under torchrun (FSDP2), one run
# killed and resumed, every milestone evaluated on six local tasks under the names of the real ones.
set -euo pipefail
here=experiments/paper/rehearsal data=data/rehearsal runs=runs/paper-rehearsal
export OMP_NUM_THREADS=1

python $here/corpora.py $data/texts
llada prepare --source $data/texts/english.jsonl --out $data/english --vocab-size 512 --val-fraction 0.1
llada prepare --source $data/texts/chinese.jsonl --out $data/chinese --tokenizer $data/english --val-fraction 0.1
llada prepare --source python-stdlib --out $data/code --tokenizer $data/english --val-fraction 0.1 --max-bytes 1000000

train() { # the number of the model in the sweep, and its name
  torchrun --standalone --nproc-per-node 2 --no-python \
    llada sweep run sweeps/paper-scalability.yaml --index "$1" \
    -- --config $here/common.yaml --config $here/"${2//-/_}".yaml
}

kill_on_the_way() { # train until the first milestone has its result, then kill all processes with -9
  set -m
  train "$@" &
  launcher=$!
  set +m
  until [[ -e $runs/$2/result.json ]] || ! kill -0 $launcher 2>/dev/null; do sleep 0.2; done
  kill -9 -- -$launcher 2>/dev/null && echo "killed $2 on its way"
  wait $launcher || true
}

[[ -e $runs/arm-7b/result.json ]] || kill_on_the_way 1 arm-7b
models=(arm-1b arm-7b llada-1b llada-8b)
for number in "${!models[@]}"; do train "$number" "${models[$number]}"; done
for model in "${models[@]}"; do
  llada evaluate $runs/"$model" --each-result --suite scalability --include-path $here/tasks --unsafe-code \
    --length 8 --steps 8 --monte-carlo 16
done
llada collect $runs --out $runs/results.csv
llada curves $runs/results.csv --out $runs --paper
echo "the figure: $runs/paper.png"
