"""`slurm/pretrain.sbatch` as SLURM runs it, with an srun and a scontrol that play a cluster of two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaroute.launch import job, status, submit

REPOSITORY = Path(__file__).resolve().parents[3]

SRUN = r"""#!/bin/bash
# What the ranks (or the check of the nodes) would leave, as the test says with CODES, STATUS and SICK.
echo "$*" >>"$LOG"
if [[ "$*" == *megaroute.launch.health* ]]; then
  folder="${*: -2:1}"
  for host in node1 node2; do
    problem=""; [ "$host" != "${SICK:-}" ] || problem='"no memory"'
    echo "{\"port\": 1, \"unreachable\": [], \"problems\": [$problem]}" >"$folder/$host.json"
  done
  exit 0
fi
say() {
  local rank=0 code
  for code in $1; do
    echo "{\"code\": $code, \"host\": \"node1\", \"why\": \"the reason\"}" >"$MEGAROUTE_EXITS/rank-0000$rank.json"
    rank=$((rank + 1))
  done
}
if [ -n "${WAIT:-}" ]; then
  trap 'say "75 75 75 75"; exit 0' USR1
  touch "$LOG.up"
  while :; do sleep 0.1; done
fi
bash -c "${DURING:-:}"
if [ -n "${SAVES:-}" ]; then mkdir -p "$SAVES"; touch "$SAVES/complete.json"; fi
say "${CODES:-}"
exit "${STATUS:-0}"
"""
SCONTROL = r"""#!/bin/bash
case "$1 $2" in
  "show hostnames") printf 'node1\nnode2\n' ;;
  "show job") echo "JobId=$3 JobState=${STATE:-RUNNING} Reason=None Restarts=${RESTARTS:-0}" ;;
  *) echo "scontrol $*" >>"$LOG" ;;
esac
"""


class Sbatch:
    """Runs the batch script."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.log = folder / "run", folder / "log"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "env.sh").write_text(f'export PATH="{folder}:{folder}/bin:$PATH"\n')
        (folder / "bin").mkdir()
        (folder / "bin" / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        (folder / "bin" / "python").chmod(0o755)
        self.environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MEGAROUTE_ENV": str(folder / "env.sh")}
        self.environment |= {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4"}
        self.environment |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "LOG": str(self.log)}
        self.environment |= {"MEGAROUTE_HEALTH": "quick"}

    def start(self, **settings: str) -> "subprocess.Popen[str]":
        command = ["bash", "slurm/pretrain.sbatch", "pretrain_configs/debug/cpu.yaml", f"run.directory={self.run_dir}"]
        environment = {**self.environment, **settings}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stderr=subprocess.PIPE)

    def run(self, **settings: str) -> int:
        process = self.start(**settings)
        self.said = process.communicate(timeout=60)[1]
        return process.returncode

    def commands(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("scontrol")]

    def status(self) -> status.Status:
        found = status.read(self.run_dir)
        assert found is not None
        return found


@pytest.fixture
def sbatch(tmp_path):
    return Sbatch(tmp_path)


@pytest.mark.parametrize(
    "codes, code, state",
    [("0 0 0 0", 0, "finished"), ("1 69", 1, "failed"), ("2 2 2 2", 2, "failed")],
)
def test_exit_status_is_that_of_the_run(sbatch, codes, code, state):
    assert sbatch.run(CODES=codes, STATUS=str(code)) == code
    assert sbatch.status().state == state
    assert sbatch.commands() == []
    assert code == 0 or "rank 0 on node1: the reason" in sbatch.said


@pytest.mark.parametrize("codes, status_", [("75 75 75 75", "0"), ("69 69", "143"), ("", "1"), ("", "0")])
def test_run_that_may_go_on_is_requeued_and_never_completed(sbatch, codes, status_):
    assert sbatch.run(CODES=codes, STATUS=status_) == 75
    assert sbatch.commands() == ["scontrol requeue 71"]
    assert sbatch.status().state == "requeued"


def test_second_attempt_without_a_checkpoint_ends_the_job(sbatch):
    assert sbatch.run(STATUS="143") == 75
    assert sbatch.run(STATUS="143", SLURM_RESTART_COUNT="1") == 1
    assert sbatch.status().state == "failed"
    assert "2 attempts in a row ended without a new checkpoint" in sbatch.status().why
    assert sbatch.commands() == ["scontrol requeue 71"]


def test_progress_lets_the_job_go_on(sbatch):
    for number in range(3):
        saves = str(sbatch.run_dir / "checkpoints" / f"step-{number + 1:08d}")
        assert sbatch.run(STATUS="143", SLURM_RESTART_COUNT=str(number), SAVES=saves) == 75
    assert [attempt.last_step for attempt in sbatch.status().attempts] == [1, 2, 3]
    assert sbatch.run(STATUS="143", SLURM_RESTART_COUNT="3", MEGAROUTE_MAX_FAILURES="3") == 1
    assert "died or hung" not in sbatch.status().attempts[-1].why


def test_attempts_that_died_with_their_node_are_counted_at_the_next_start(sbatch):
    lost = status.Attempt("71", 0, ("node1",), "", 0)
    sbatch.run_dir.mkdir()
    status.write(sbatch.run_dir, status.Status("running", attempts=(lost, lost)))
    assert sbatch.run(SLURM_RESTART_COUNT="2") == 1
    assert "without a new checkpoint" in sbatch.status().why
    assert not sbatch.log.exists()


def test_sick_node_is_left_out_of_the_next_start(sbatch):
    assert sbatch.run(SICK="node2") == 75
    assert sbatch.commands() == ["scontrol requeue 71", "scontrol update JobId=71 ExcNodeList=node2"]
    assert sbatch.status().why == "node2: no memory"
    assert "pretrain" not in sbatch.log.read_text().replace("slurm/pretrain", "")


def test_cancelled_job_stays_cancelled(sbatch):
    assert sbatch.run(CODES="75 75 75 75", STATE="CANCELLED") == 75
    assert sbatch.commands() == []
    assert sbatch.status().state == "stopped"


def test_start_that_was_cut_off_leaves_the_status_of_the_next_one_and_does_not_requeue_it(sbatch):
    taken_over = f"""sed -i 's/"restart": 0/"restart": 1/' {sbatch.run_dir}/status.json"""
    assert sbatch.run(STATUS="143", DURING=taken_over) == 75
    assert sbatch.commands() == []
    assert (sbatch.status().state, sbatch.status().restart) == ("running", 1)


def test_start_that_was_cut_off_does_not_requeue_a_job_that_slurm_has_started_again(sbatch):
    assert sbatch.run(STATUS="143", RESTARTS="1") == 75
    assert sbatch.commands() == []
    assert sbatch.status().state == "running"


@pytest.mark.parametrize("codes, code, commands", [("0 0 0 0", 0, []), ("75 75 75 75", 75, ["scontrol requeue 71"])])
def test_status_that_cannot_be_written_changes_nothing_of_the_job(sbatch, codes, code, commands):
    path = sbatch.run_dir / "status.json"
    assert sbatch.run(CODES=codes, DURING=f"rm {path} && mkdir -p {path}/in-the-way") == code
    assert sbatch.commands() == commands
    assert "status.json is not up to date" in sbatch.said


def test_a_run_directory_that_cannot_be_written_ends_the_job_in_one_sentence(sbatch):
    sbatch.run_dir.write_text("in the way")
    assert sbatch.run(CODES="0 0 0 0") not in (0, 75)
    (line,) = [line for line in sbatch.said.splitlines() if "error" in line]
    assert f"{sbatch.run_dir} cannot be written" in line and "Traceback" not in sbatch.said
    assert not sbatch.log.exists() or sbatch.commands() == []


def test_chain_does_not_requeue_and_its_later_jobs_respect_the_verdict(sbatch):
    chain = {"MEGAROUTE_REQUEUE": "chain", "MEGAROUTE_CHAIN": "c1"}
    assert sbatch.run(CODES="75 75 75 75", **chain) == 75
    assert sbatch.commands() == []
    assert sbatch.run(CODES="0 0 0 0", SLURM_JOB_ID="72", **chain) == 0
    started = sbatch.log.read_text()
    assert sbatch.run(CODES="1 1 1 1", SLURM_JOB_ID="73", **chain) == 0
    assert sbatch.log.read_text() == started
    assert "nothing to do: the run has finished" in sbatch.said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=str)
def test_signal_reaches_the_ranks_and_the_job_is_requeued(sbatch, number):
    process = sbatch.start(WAIT="1")
    end = time.monotonic() + 30
    while not Path(f"{sbatch.log}.up").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert sbatch.status().attempts[-1].ending == "stopped"
    assert sbatch.commands() == ["scontrol requeue 71"]


def test_srun_is_told_everything_it_might_choose_otherwise(sbatch):
    sbatch.run(CODES="0 0 0 0", MEGAROUTE_SRUN="--cpu-bind=none")
    line = sbatch.log.read_text().splitlines()[-1]
    for word in (
        "--ntasks=4",
        "--ntasks-per-node=2",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--cpu-bind=none",
    ):
        assert word in line.split()


def test_task_of_an_array_takes_its_line(tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# learning rates\nrun.name=a optim.lr=1e-3\n\nrun.name=b optim.lr=2e-3\n")
    words = job.sweep_overrides({"MEGAROUTE_SWEEP": str(sweep), "SLURM_ARRAY_TASK_ID": "1"})
    assert words == ["run.name=b", "optim.lr=2e-3"]
    assert job.sweep_overrides({}) == []


@pytest.mark.parametrize("task, sentence", [("2", "use --array=0-1"), ("1", "no run.name")])
def test_sweep_that_cannot_work_is_refused(tmp_path, task, sentence):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run.name=a\noptim.lr=1\n")
    with pytest.raises(job.ConfigError, match=sentence):
        job.sweep_overrides({"MEGAROUTE_SWEEP": str(sweep), "SLURM_ARRAY_TASK_ID": task})


def test_submitting_writes_the_first_status(tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$MEGAROUTE_CHAIN|$*" >>{tmp_path}/asked\necho 71\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = f"run.directory={tmp_path / 'run'}"
    config = str(REPOSITORY / "pretrain_configs/debug/cpu.yaml")
    assert submit.main(["--nodes=2", "--time=60", "--", config, run]) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "queued"
    assert submit.main(["--chain=3", "--nodes=2", "--", config, run]) == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == f"|--parsable --nodes=2 --time=60 slurm/pretrain.sbatch {config} {run}"
    assert len(asked) == 4
    chains = {line.partition("|")[0] for line in asked[1:]}
    assert len(chains) == 1
    assert "--dependency=singleton --no-requeue" in asked[1]
    assert "job 71" in capsys.readouterr().out
