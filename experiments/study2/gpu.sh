#!/usr/bin/env bash
# The second study on one GPU: experiments/study2/gpu.sh [OBJECTIVE ...], by default arm, easy and block4.
# Every step skips what is done, so that it can be stopped at any time, also by `timeout 600`, and started again.
# JOBS runs share the GPU (4), DEVICE is its name (H200), LLADA is the command (llada), and SCALE is a factor on all
# budgets (1), for a rehearsal.
set -euo pipefail

read -ra llada <<< "${LLADA:-llada}"
jobs=${JOBS:-4} runs=runs/study2-gpu tune=runs/study2-gpu-tune
common=(--budget-convention total --data data/study2-gpu --sequence-length 256 --device "${DEVICE:-H200}")
[ $# -gt 0 ] || set -- arm easy block4

settings() {  # what an objective is planned with
  case $1 in
    arm) echo "--objectives arm --centre-arm 30 --base experiments/study2/gpu.yaml" ;;
    easy) echo "--objectives llada --centre-llada 80 --base experiments/study2/gpu-easy.yaml" ;;
    llada) echo "--objectives llada --centre-llada 80 --base experiments/study2/gpu.yaml" ;;
    block4) echo "--objectives block --centre-block 80 --block-length 4 --base experiments/study2/gpu.yaml" ;;
  esac
}

budgets() {  # FLOPs of a step of the study; arm has the losses of the others at about a thirtieth of their FLOPs
  local flops
  case $1:$2 in
    tune:arm) flops="6.25e12 1.25e13 2.5e13" ;;
    tune:*) flops="6.25e13 1.25e14 2.5e14" ;;
    main:arm) flops="6.25e12 2.5e13 1e14 4e14 1.6e15" ;;
    main:*) flops="2.5e14 1e15 4e15" ;;
    largest:arm) flops="6.4e15" ;;
    largest:*) flops="1.6e16" ;;
  esac
  awk -v scale="${SCALE:-1}" '{ for (i = 1; i <= NF; i++) printf "%.6g ", $i * scale }' <<< "$flops"
}

for name in "$@"; do
  case $name in
    arm | easy | llada | block4) ;;
    *) echo "error: no objective '$name'; choose from arm, easy, llada and block4" >&2; exit 2 ;;
  esac
done

for name in "$@"; do
  read -ra own <<< "$(settings "$name") ${common[*]}"
  mkdir -p "$tune/$name" "$runs"
  if [ ! -e "$tune/$name/sweep.yaml" ]; then
    read -ra flops <<< "$(budgets tune "$name")"
    "${llada[@]}" plan --tune --tune-rates 0.5 1 2 --tune-batches 0.25 0.5 1 --flops "${flops[@]}" "${own[@]}" \
      --study "study2-gpu-tune/$name" --out "$tune/$name/sweep.yaml"
  fi
  "${llada[@]}" sweep run "$tune/$name/sweep.yaml" --jobs "$jobs"
  if [ ! -e "$runs/plan-$name.yaml" ]; then
    "${llada[@]}" collect "$tune/$name" --out "$tune/$name/results.csv"
    "${llada[@]}" curves "$tune/$name/results.csv" --convention total --rules --out "$tune/$name"
    rule=(--rule "$tune/$name/rules.json")
    if [ ! -e "${rule[1]}" ]; then
      echo "note: $name has no optima inside of its grid at three budgets; the rules of the package serve instead" >&2
      rule=()  # with the factor on the rate that masked objectives wanted in the first study
      case $name in easy | llada) rule=(--lr-scale-llada 0.3) ;; block4) rule=(--lr-scale-block 0.3) ;; esac
    fi
    read -ra flops <<< "$(budgets main "$name")"
    "${llada[@]}" plan --points 3 --seeds 0 1 2 --flops "${flops[@]}" "${own[@]}" ${rule[@]+"${rule[@]}"} --study study2-gpu \
      --out "$runs/plan-$name.yaml"
  fi
  "${llada[@]}" sweep run "$runs/plan-$name.yaml" --jobs "$jobs"
done

# The forecast is written once, before the largest budgets are run.
if [ ! -e "$runs/forecast.json" ]; then
  "${llada[@]}" collect "$runs" --out "$runs/results.csv"
  read -ra flops <<< "$(budgets largest arm) $(budgets largest others)"
  "${llada[@]}" forecast "$runs/results.csv" --convention total --flops "${flops[@]}" --out "$runs/forecast.json"
fi
for name in "$@"; do
  if ! grep -q -- "--append" "$runs/plan-$name.yaml"; then
    read -ra flops <<< "$(budgets largest "$name")"
    "${llada[@]}" plan --append "$runs/plan-$name.yaml" --flops "${flops[@]}"
  fi
  "${llada[@]}" sweep run "$runs/plan-$name.yaml" --jobs "$jobs"
done
"${llada[@]}" collect "$runs" --out "$runs/results.csv"
"${llada[@]}" curves "$runs/results.csv" --convention total --forecast "$runs/forecast.json" --out "$runs"
"${llada[@]}" report "$runs/results.csv" --convention total
