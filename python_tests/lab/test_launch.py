"""Many runs as jobs: the queue and its limit, failures kept and taken up again, ranks."""

import pytest
import submitit

from ses_lab import launch, training
from ses_lab.config import RunConfig, merge
from ses_lab.folder import RunFolder

TINY = {"dataset": {"name": "moons", "samples": 64}, "model": {"name": "mlp", "width": 8},
        "epochs": 2, "batch_size": 32, "device": "cpu"}  # fmt: skip
FATAL = {"optimizer": {"name": "sgd", "lr": 1e30}}


def runs(root, **changes):
    configs = {seed: RunConfig.parse(merge(TINY, {"seed": seed, **changes})) for seed in range(5)}
    return {root / str(seed): config for seed, config in configs.items()}


class Queue:
    """In the place of a scheduler: a job runs when the queue is looked at the second time."""

    def __init__(self, folder, cluster):
        self.queued, self.most, self.devices, self.log = [], 0, [], []
        Queue.last = self

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def submit(self, function, config, folder):
        job = Job(self, function, config, folder)
        self.queued.append(job)
        self.most = max(self.most, len(self.queued))
        self.devices.append(config["device"])
        busy = [other.config["device"] for other in self.queued]
        assert config["device"] == "cpu" or len(set(busy)) == len(busy)
        return job


class Job:
    def __init__(self, queue, function, config, folder):
        self.queue, self.function, self.config, self.folder = queue, function, config, folder
        self.looks, self.error, self.cancelled = 0, None, False

    def done(self):
        self.looks += 1
        if self.looks < 2:
            return False
        self.queue.queued.remove(self)
        try:
            training.run(RunConfig.parse({**self.config, "device": "cpu"}), self.folder)
        except Exception as error:
            self.error = error
        return True

    def exception(self):
        return self.error

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.setattr(submitit, "AutoExecutor", Queue)


def test_the_limit_and_what_fails(queue, tmp_path):
    wanted = runs(tmp_path)
    bad = tmp_path / "3"
    wanted[bad] = RunConfig.parse(merge(wanted[bad].to_dict(), FATAL))
    options = {"logs": tmp_path / "jobs", "limit": 2, "poll": 0.0}
    failed = launch.launch(wanted, **options, slurm_partition="gpu")
    assert Queue.last.most == 2
    assert Queue.last.parameters["slurm_partition"] == "gpu"
    assert failed.keys() == {bad}
    assert "lower the learning rate" in failed[bad]
    assert all(RunFolder(path).finished() for path in wanted if path != bad)
    # Again: what is finished is not queued, what failed is.
    assert launch.launch(wanted, **options).keys() == {bad}
    assert len(Queue.last.devices) == 1


def test_one_run_a_device(queue, tmp_path):
    devices = ["cuda:0", "cuda:1"]
    options = {"logs": tmp_path / "jobs", "limit": 8, "poll": 0.0, "devices": devices}
    assert launch.launch(runs(tmp_path), **options) == {}
    assert Queue.last.most == 2
    assert set(Queue.last.devices) == set(devices)
    assert RunFolder(tmp_path / "0").finished()


def test_students_wait_for_their_teacher(queue, tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    learning = {"regime": "distill", "teacher.run": str(teacher)}
    wanted = {student: RunConfig.parse(merge(TINY, learning)), teacher: RunConfig.parse(TINY)}
    options = {"logs": tmp_path / "jobs", "poll": 0.0}
    assert launch.launch(wanted, **options) == {}
    assert Queue.last.most == 1
    lost = {path.with_name(f"{path.name}2"): config for path, config in wanted.items()}
    lost[tmp_path / "teacher2"] = RunConfig.parse(merge(TINY, FATAL))
    learning["teacher.run"] = str(tmp_path / "teacher2")
    lost[tmp_path / "student2"] = RunConfig.parse(merge(TINY, learning))
    failed = launch.launch(lost, **options)
    assert failed.keys() == lost.keys()
    assert "teacher2 failed, which it starts from" in failed[tmp_path / "student2"]


def test_jobs_do_not_outlive_an_interrupted_launch(queue, tmp_path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch.launch(runs(tmp_path), logs=tmp_path / "jobs", limit=3)
    assert [job.cancelled for job in Queue.last.queued] == [True] * 3


def test_processes_of_this_machine(tmp_path, monkeypatch):
    """submitit's own executor: two ranks of a run that fails."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    path = tmp_path / "run"
    options = {"logs": tmp_path / "jobs", "poll": 0.1, "timeout_min": 1, "tasks_per_node": 2}
    failed = launch.launch({path: RunConfig.parse(merge(TINY, FATAL))}, **options)
    assert "lower the learning rate" in failed[path]
    status = RunFolder(path).status()
    assert (status["state"], status["ranks"]) == ("failed", 2)


def test_preempted_jobs_are_queued_again(tmp_path, monkeypatch):
    again = launch._Job().checkpoint(TINY, str(tmp_path))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")  # as inside a job of one task
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "1")
    again.function(*again.args)
    assert RunFolder(tmp_path).finished()


def test_slurm(tmp_path, monkeypatch):
    """The commands of Slurm, as scripts that run the job here."""
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {
        # It copies the file, and submitit moves the job's arguments once it has the number.
        "sbatch": 'cp "$1" "$0.sh"; (sleep 0.5; bash "$0.sh") > /dev/null 2>&1 & '
        "echo Submitted batch job 7",
        # srun [options of its own] python -u -m submitit.core._submit FOLDER
        "srun": 'while [[ "$1" != *python* ]]; do shift; done; SLURM_JOB_ID=7 SLURM_PROCID=0 '
        'SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_JOB_NODELIST=here exec "$@"',
        "sacct": "echo 'JobID|State|NodeList'; echo '7|RUNNING|here'",
    }
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    path = tmp_path / "run"
    options = {"logs": tmp_path / "jobs", "poll": 0.2, "cluster": "slurm"}
    assert launch.launch({path: RunConfig.parse(TINY)}, **options, slurm_partition="gpu") == {}
    (submission,) = (tmp_path / "jobs").glob("*submission.sh")
    assert "#SBATCH --partition=gpu" in submission.read_text()
