"""lm-evaluation-harness's own command, which knows the model `megalina`, too.

python -m megalina.evaluate.lm_eval --model megalina --model_args checkpoint=RUN --include_path FOLDER --tasks megalina_local
torchrun --nproc-per-node 4 -m megalina.evaluate.lm_eval --model megalina --model_args checkpoint=RUN --tasks ...

`pip install 'megalina[lm-eval]'` puts it on the path as `megalina-lm-eval`.  The harness (0.4.13) looks for models in a table of
its own and imports no others, so its script `lm_eval` can't be told of one; this is that script, once the model is registered.
"""

import sys
from importlib.util import find_spec

import torch.distributed as dist


def main() -> int:
    if find_spec("lm_eval") is None:
        print("lm-evaluation-harness is not installed: pip install 'megalina[lm-eval]'", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    import megalina.evaluate.harness  # noqa: F401  registers the model

    try:
        cli_evaluate()
    except ValueError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
