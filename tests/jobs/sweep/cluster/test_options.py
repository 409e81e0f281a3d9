"""What `--slurm` takes, with times against SLURM's own table of forms, and a line for each mistake."""

from __future__ import annotations

import pytest

from neq_cli.errors import RecipeError
from neq_cli.jobs.sweep.cluster.options import SlurmOptions, parse_slurm, slurm_minutes


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("30:01", 31),
        ("04:00:00", 4 * 60),
        ("1:02:03", 60 + 2 + 1),
        ("1-12", 36 * 60),
        ("2-01:30", 49 * 60 + 30),
        ("0-00:00:01", 1),
    ],
)
def test_times_are_slurms(text: str, minutes: int) -> None:
    assert slurm_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "00:00:00", "4h", "1:2:3:4", "-1", "1-", "1.5", "UNLIMITED"])
def test_what_is_no_time_of_a_job_is_none(text: str) -> None:
    assert slurm_minutes(text) is None


def test_options_are_those_of_sbatch() -> None:
    given = [
        "partition=gpu",
        "--cpus-per-task=8",
        "gres=gpu:a100:1",
        "exclusive=true",
        "time=1-12",
        "signal_delay_s=30",
    ]
    others = {"partition": "gpu", "cpus_per_task": "8", "gres": "gpu:a100:1", "exclusive": True}
    assert parse_slurm(given) == SlurmOptions(36 * 60, 30, others)
    assert parse_slurm(["mem=32G"]) == SlurmOptions(60, 90, {"mem": "32G"})
    assert parse_slurm(["nodes=1", "comment=a=b c"]).others == {"nodes": "1", "comment": "a=b c"}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("partition", "not KEY=VALUE, such as partition=gpu, time=04:00:00 or gres=gpu:1"),
        ("partition=", "not KEY=VALUE, such as partition=gpu, time=04:00:00 or gres=gpu:1"),
        ("a b=c", "not KEY=VALUE, such as partition=gpu, time=04:00:00 or gres=gpu:1"),
        ("time=4h", "not a time as SLURM has it, such as 30 (minutes), 04:00:00 or 1-12"),
        ("signal_delay_s=soon", "not a number of seconds from 1 to 65535"),
        ("array=0-3", "is neq's own: a sweep is one array; --jobs says how many of its jobs run at once"),
        ("nodes=2", "a run of a sweep is one process; several for one run are torchrun's, in a script of your own"),
        (
            "ntasks-per-node=4",
            "a run of a sweep is one process; several for one run are torchrun's, in a script of your own",
        ),
    ],
)
def test_a_mistake_is_one_line(given: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_slurm(["partition=gpu" if given != "partition=" else "mem=1G", given])
    assert caught.value.problems == (f"--slurm {given}: {line}",)


def test_mistakes_come_together_and_nothing_that_ends_a_line_of_the_script_gets_into_it() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_slurm(["mem=1G", "mem=2G", "comment=a\n#SBATCH --x"])
    assert [line.partition(": ")[2][:10] for line in caught.value.problems] == ["given twic", "not KEY=VA"]
    assert "\n" not in "".join(caught.value.problems)
