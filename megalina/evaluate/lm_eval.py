"""lm-evaluation-harness's own command, which knows the model `megalina`, too.

python -m megalina.evaluate.lm_eval --model megalina --model_args checkpoint=RUN --include_path FOLDER --tasks megalina_local
torchrun --nproc-per-node 4 -m megalina.evaluate.lm_eval --model megalina --model_args checkpoint=RUN --tasks ...

`pip install 'megalina[lm-eval]'` puts it on the path as `megalina-lm-eval`.  The harness (0.4.13) looks for models in a table of
its own and imports no others, so its script `lm_eval` can't be told of one; this is that script, once the model is registered.
"""

import sys
from importlib.util import find_spec


def main() -> int:
    if find_spec("lm_eval") is None:
        print("lm-evaluation-harness is not installed: pip install 'megalina[lm-eval]'", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    from megalina.evaluate.harness import leave_group  # registers the model

    try:
        cli_evaluate()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
