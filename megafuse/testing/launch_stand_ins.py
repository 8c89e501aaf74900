"""`megafuse` and `torchrun` for tests of launching: shell scripts that leave what the real commands would, at once."""

from pathlib import Path

_PROGRAMS = {
    "megafuse": r"""
        case " $* " in *" --print_config "* | " doctor "*) exit 0 ;; esac
        echo "megafuse $*" >> "$RUN/log"
        while [ $# -gt 0 ]; do
          case "$1" in
            build | import) what=$1 ;;
            export) what=$1; shift 2; out=$1 ;;
            --output) out=$2; shift ;;
            *) [ "${what:-}" != import ] || out=$1 ;;
          esac
          shift
        done
        mkdir -p "$out"
        if [ "$what" = export ]; then echo '{}' > "$out/config.json"; else echo '{}' > "$out/manifest.json"; fi""",
    "torchrun": r"""
        echo "torchrun $*" >> "$RUN/log"
        [ -z "${FAIL_WITH:-}" ] || exit "$FAIL_WITH"
        case " $* " in
          *" megafuse reference "*)
            mkdir -p "$RUN/reference"; echo '{"complete": true}' > "$RUN/reference/manifest.json" ;;
          *" megafuse eval "*)
            mkdir -p "$RUN/eval"; echo '{"intra": 0.75, "cross": {"accuracy": 0.5}}' > "$RUN/eval/accuracy.json" ;;
          *" megafuse train "*)
            mkdir -p "$RUN/train/checkpoints/step_00000002"
            for step in 1 2; do
              echo "{\"step\": $step, \"loss\": 0.$step, \"margin\": $step, \"tokens_per_second\": ${step}00}"
            done > "$RUN/train/metrics.jsonl" ;;
        esac""",
}


def write_stand_ins(folder: Path) -> Path:
    """Write both into `folder`, for the front of a PATH. Each adds its command line to RUN/log; FAIL_WITH is the exit
    code of torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in _PROGRAMS.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\nset -eu\n{body}\n")
        path.chmod(0o755)
    return folder
