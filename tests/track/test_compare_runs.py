import json

import pytest

from tests.track.fake_run import write_run
from tools.compare_runs import differing, find_runs, main


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_run(folder / "0", lr=1e-3, layers=2)
    write_run(folder / "1", lr=2e-3, layers=2)
    write_run(folder / "2", lr=2e-3, layers=2, router="expert_choice", until=20)
    (folder / "0" / ".hydra").mkdir()  # Hydra's own config.yaml is no run
    (folder / "0" / ".hydra" / "config.yaml").write_text((folder / "0" / "config.yaml").read_text())
    (folder / "notes").mkdir()
    (folder / "notes" / "config.yaml").write_text("title: no run\n")
    return folder


def test_the_table_has_every_run_sorted_by_validation_loss_with_what_differs(sweep, capsys, tmp_path):
    assert main([str(sweep), "--json", str(tmp_path / "table.json"), "--png", str(tmp_path / "curves.png")]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["run"] for row in rows] == ["1", "0", "2"]
    assert [row["val_loss"] for row in rows] == sorted(row["val_loss"] for row in rows)
    assert rows[0]["overrides"] == {"router.kind": "topk", "optim.lr": 2e-3}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "val", "loss", "train", "loss", "tokens/s", "steps", "kind", "lr"]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "0", "2"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_and_expert_choice_runs_are_marked(sweep, capsys):
    main([str(sweep)])
    lines = capsys.readouterr().out.splitlines()
    assert "20/60 unfinished" in lines[4] and "*" in lines[4]
    assert "unfinished" not in lines[2] + lines[3] and "*" not in lines[2] + lines[3]
    assert any(line.startswith("* expert choice looks at later tokens") for line in lines)
    assert (sweep / "compare_runs.png").exists()


def test_the_numbers_are_those_of_the_metrics_file(sweep):
    run = find_runs(sweep)[0]
    records = [json.loads(line) for line in (sweep / "0" / "metrics.jsonl").read_text().splitlines()]
    assert run.val_loss == records[-1]["val_loss"]
    assert run.train_loss == pytest.approx(sum(record["loss"] for record in records[-6:]) / 6, rel=1e-12)
    assert run.tokens_per_s == sorted(record["tokens_per_s"] for record in records)[30]


def test_a_run_that_never_began_and_one_with_a_broken_file_are_listed_with_the_reason(tmp_path, capsys):
    write_run(tmp_path / "good", steps=10)
    write_run(tmp_path / "broken", steps=10)
    (tmp_path / "broken" / "metrics.jsonl").write_text("nonsense\n{}\n")
    write_run(tmp_path / "never", steps=10)
    (tmp_path / "never" / "metrics.jsonl").unlink()
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("good")
    assert any(line.startswith("broken: ") and "line 1" in line for line in lines)
    assert any(line.startswith("never: never began") for line in lines)


def test_a_single_run_folder_compares_with_nothing(tmp_path):
    write_run(tmp_path / "only", steps=10)
    runs = find_runs(tmp_path / "only")
    assert [run.name for run in runs] == ["only"] and differing(runs) == []


def test_a_folder_without_runs_is_an_error_of_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
