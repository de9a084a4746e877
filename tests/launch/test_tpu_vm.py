"""launch/tpu_vm.sh against a fake gcloud, whose ssh executes the command lines for real."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from tests.launch.fakes import wait_until
from tests.processes import ROOT

WHERE = "--name=rlhf", "--zone=us-east5-a"
VM = *WHERE, "--type=v5p-16"
JOB = "--config=configs/sft.py", "--workdir=runs/x"


def private(file, text):
    file.touch(mode=0o600)
    file.write_text(text)
    return file


def run(world, *options, job=JOB, expect=0, **environment):
    return world.run("tpu_vm.sh", "run", *VM, *options, "--", *job, expect=expect, **environment)


def test_exactly_the_files_that_git_tracks_are_copied(world):
    world.set(workers=2, **{"tpu-vm": ["READY"]})
    (world.checkout / "a file with 'quotes'.txt").write_text("as in git")
    (world.checkout / "deleted.txt").write_text("")
    (world.checkout / "old.txt").write_text("")
    world.track()
    (world.checkout / "a file with 'quotes'.txt").write_text("as on disk")
    (world.checkout / "deleted.txt").unlink()
    (world.checkout / "notes.txt").write_text("untracked")
    errors = world.run("tpu_vm.sh", "sync", *WHERE).stderr
    assert "not copied, since git does not track them: notes.txt" in errors
    for worker in ("worker-0", "worker-1"):
        code = world.folder / worker / "jax_rlhf"
        assert (code / "a file with 'quotes'.txt").read_text() == "as on disk"
        assert (code / "launch" / "tpu_worker.sh").is_file()
        assert (code / "old.txt").exists()
        assert not (code / "notes.txt").exists()
        assert not (code / ".git").exists()

    (world.checkout / "old.txt").unlink()
    world.track()
    (world.folder / "worker-0" / "jax_rlhf" / "runs").mkdir()
    world.run("tpu_vm.sh", "sync", *WHERE)
    code = world.folder / "worker-0" / "jax_rlhf"
    assert not (code / "old.txt").exists()
    assert (code / "runs").is_dir()  # files that the worker made are kept


def test_all_workers_run_the_command_with_every_character_intact(world):
    job = (
        *JOB,
        "--config.a=two  spaces",
        "--b=it's",
        '--c="$HOME" `id` \\ * & ; |',
        "--d=",
        "--e=a\nb",
        "--f=ü€",
        "-- --",
    )
    world.set(workers=2)
    run(world, job=job)
    for worker in (0, 1):
        assert world.runs(worker) == [list(job)]
    (call, _) = world.calls("-m", "jax_rlhf")
    assert call["cwd"] == str(world.folder / "worker-0" / "jax_rlhf")


def test_compiled_programs_are_cached_in_the_workdir_by_default(world):
    world.set(workers=2)
    run(world, job=("--config=configs/sft.py", "--workdir", "gs://bucket/it's $x"))
    kept = [(call["JAX_COMPILATION_CACHE_DIR"], call["XLA_CACHES"]) for call in world.calls("-m", "jax_rlhf")]
    assert kept == [("gs://bucket/it's $x/compile_cache", "none")] * 2
    private(world.folder / "my.env", "JAX_COMPILATION_CACHE_DIR=/elsewhere\n")
    run(world, "--env-file=my.env")
    assert world.calls("-m", "jax_rlhf")[-1]["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_run_shows_the_log_of_worker_0_and_installs_once(world):
    assert run(world).stdout == "a line of the log, then 0\n"
    assert len(world.calls("-m", "pip", "install", ".[tpu]")) == 1
    assert run(world).stdout == "a line of the log, then 0\n"
    assert len(world.calls("-m", "pip")) == 1
    assert world.run("tpu_vm.sh", "logs", *WHERE).stdout == "a line of the log, then 0\n"


@pytest.mark.parametrize("code", [70, 139])
def test_a_crash_restarts_the_run_only_while_it_advances(world, code):
    world.set(**{"exit codes": {"0": [code, code, 0]}})
    run(world)
    assert len(world.runs()) == 3
    world.set(progress=["sft 7"], **{"exit codes": {"0": [code] * 9}})
    errors = run(world, expect=70).stderr
    assert "started 3 times without getting further than sft 7; not again" in errors
    assert len(world.runs()) == 3 + 4


@pytest.mark.parametrize("code", [1, 2])
def test_a_user_error_is_the_exit_code_and_is_not_retried(world, code):
    world.set(**{"exit codes": {"0": [code]}})
    assert f"a line of the log, then {code}" in run(world, expect=code).stdout
    assert len(world.runs()) == 1


@pytest.mark.parametrize("codes", [[70, 1], [1, 70], [139, 2], [2, 75]])
def test_a_user_error_on_any_worker_is_not_retried(world, codes):
    world.set(workers=2, **{"exit codes": {str(worker): [code] for worker, code in enumerate(codes)}})
    run(world, expect=min(codes))
    assert len(world.runs(0)) == len(world.runs(1)) == 1


def test_exit_code_75_restarts_the_command_on_the_same_vm(world):
    world.set(workers=2, **{"exit codes": {"0": [75, 0], "1": [75, 0]}})
    output = run(world).stdout
    assert output.splitlines() == [f"a line of the log, then {code}" for code in (75, 0)]
    assert world.runs(0) == world.runs(1) == [list(JOB)] * 2
    assert len(world.calls("tpu-vm", "create")) == 1


def test_one_preempted_worker_restarts_the_run(world):
    world.set(workers=2, **{"exit codes": {"0": [134, 0], "1": [75, 0]}})
    run(world)
    assert len(world.runs()) == 2


def test_the_number_of_restarts_is_bounded(world):
    world.set(**{"exit codes": {"0": [75] * 9}})
    errors = run(world, "--max-restarts=2", expect=75).stderr
    assert len(world.runs()) == 3
    assert "--max-restarts=2 is used up" in errors


@pytest.mark.parametrize("queued", [(), ("--queued",)])
def test_a_preempted_vm_is_created_again_and_the_job_continues(world, queued):
    world.set(failures=[["follow", "PREEMPTED", 255]])
    output = run(world, "--spot", *queued)
    noun = "queued-resources" if queued else "tpu-vm"
    changes = [c["arguments"][3] for c in world.calls("gcloud", noun) if c["arguments"][3] in ("create", "delete")]
    assert changes == ["create", "delete", "create"]
    assert all("--spot" in create["arguments"] for create in world.calls("create"))
    assert world.runs(0) == [list(JOB)] * 2
    assert "restart 1 of at most 10" in output.stderr


def test_a_vm_preempted_during_the_installation_is_created_again(world):
    world.set(failures=[["tpu_worker.sh install", "PREEMPTED", 255]])
    run(world)
    assert len(world.calls("create")) == 2


def test_a_failed_installation_on_a_ready_vm_is_an_error(world):
    world.set(failures=[["tpu_worker.sh install", None, 3]])
    assert "could not be made ready" in run(world, expect=1).stderr
    assert not world.runs()


def test_a_lost_connection_is_restored_without_losing_log_lines(world):
    world.set(failures=[["follow", None, 255], ["follow", None, 255]])
    output = run(world)
    assert output.stdout == "a line of the log, then 0\n"
    assert output.stderr.count("the connection to worker 0 is lost") == 2
    assert len(world.runs()) == 1


def test_an_error_takes_precedence_over_a_crash_on_another_worker(world):
    world.set(workers=2, **{"exit codes": {"0": [134], "1": [1]}})
    errors = run(world, expect=1).stderr
    assert "the end of the log of t1v-n-fake-w-1" in errors
    assert "a line of the log, then 1" in errors


def test_a_rebooted_worker_restarts_the_run(world):
    world.set(**{"exit codes": {"0": ["hang", 0]}})
    process = world.start("tpu_vm.sh", "run", *VM, "--", *JOB)
    wait_until((world.folder / "hanging").exists)
    job = world.folder / "worker-0" / "jax_rlhf_job"
    wait_until((job / "process").exists)
    pid = (job / "process").read_text().split()[0]
    (job / "process").write_text(f"{pid} of-another-boot\n")
    output, errors = process.communicate(timeout=60)
    os.killpg(int(pid), signal.SIGKILL)
    assert process.returncode == 0, errors
    assert output.splitlines() == ["a line of the log, then hang", "a line of the log, then 0"]


def following(world):
    return [call for call in world.calls("ssh", "--worker=0") if "tpu_worker.sh follow" in call["arguments"][-1]]


def test_ctrl_c_leaves_the_job_running_and_the_same_command_follows_it(world):
    world.set(workers=2, **{"exit codes": {"0": ["hang"], "1": ["hang"]}})
    first = world.start("tpu_vm.sh", "run", *VM, "--", *JOB)
    wait_until(lambda: following(world))
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=30)
    assert first.returncode == 130, errors
    assert "no longer watching" in errors

    other = run(world, job=("--config=configs/sft.py", "--workdir=runs/y"), expect=1)
    assert "is running another command" in other.stderr
    before = len(following(world))
    second = world.start("tpu_vm.sh", "run", *VM, "--", *JOB)
    wait_until(lambda: len(following(world)) > before)
    world.run("tpu_vm.sh", "stop", *WHERE)
    output, errors = second.communicate(timeout=30)
    assert "it is running already" in errors
    assert output == "a line of the log, then hang\nsaved after SIGTERM\n"
    assert second.returncode == 75  # the job saved, and `stop` prevents a restart
    assert world.runs(0) == world.runs(1) == [list(JOB)]


def test_a_job_that_runs_on_some_workers_only_is_restarted(world):
    world.set(workers=2, **{"exit codes": {"0": ["hang", 0]}})
    first = world.start("tpu_vm.sh", "run", *VM, "--", *JOB)
    wait_until((world.folder / "hanging").exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    shutil.rmtree(world.folder / "worker-1")  # worker 1 has no job
    assert "on some workers only" in run(world).stderr
    assert len(world.runs(0)) == 2


def test_an_untracked_config_is_refused_before_a_vm_is_created(world):
    (world.checkout / "configs" / "mine.py").write_text("")
    errors = run(world, job=("--config=configs/mine.py:small", "--workdir=x"), expect=1).stderr
    assert "git add configs/mine.py" in errors
    assert not world.calls("gcloud")


def test_all_workers_get_the_environment_file_and_the_setup_command(world):
    world.set(workers=2)
    private(world.folder / "my env", "HF_TOKEN='a token'\n")
    run(world, "--env-file=my env", "--setup=echo \"it's $WORKER\" > 'set up'", "--connect-flag=--internal-ip")
    for worker in (0, 1):
        home = world.folder / f"worker-{worker}"
        assert (home / "set up").read_text() == f"it's {worker}\n"
        assert (home / ".jax_rlhf" / "env").stat().st_mode & 0o077 == 0
    assert {call["HF_TOKEN"] for call in world.calls("-m", "jax_rlhf")} == {"a token"}
    connections = [c for c in world.calls("gcloud") if c["arguments"][3] in ("ssh", "scp")]
    assert all("--internal-ip" in c["arguments"] for c in connections)
    assert not any("a token" in " ".join(c["arguments"]) for c in connections)


def test_the_environment_file_is_never_readable_by_others(world):
    world.set(workers=2, **{"tpu-vm": ["READY"]})
    private(world.folder / "my.env", "HF_TOKEN=a\n")
    for worker in (0, 1):  # files left by an older version of the scripts, or by a user
        home = world.folder / f"worker-{worker}"
        home.mkdir(mode=0o755)
        (home / "jax_rlhf.env").write_text("HF_TOKEN=old\n")
        (home / ".jax_rlhf").mkdir(mode=0o777)
        (home / ".jax_rlhf" / "env").write_text("HF_TOKEN=old\n")
        (home / ".jax_rlhf" / "env").chmod(0o644)
    run(world, "--env-file=my.env")
    copied = [call for call in world.calls() if "copied" in call]
    assert {call["open_to"] for call in copied if call["copied"].endswith("env")} == {0}
    assert {call["open_to"] for call in copied if call["copied"].endswith("tar.gz")} == {
        0o044
    }  # the fake detects readable files
    assert {call["HF_TOKEN"] for call in world.calls("-m", "jax_rlhf")} == {"a"}
    for worker in (0, 1):
        home = world.folder / f"worker-{worker}"
        assert (home / ".jax_rlhf").stat().st_mode & 0o777 == 0o700
        assert (home / ".jax_rlhf" / "env").stat().st_mode & 0o777 == 0o600
        assert not (home / "jax_rlhf.env").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o660])
def test_an_environment_file_that_others_can_read_is_refused(world, mode):
    file = private(world.folder / "my env", "HF_TOKEN=a\n")
    file.chmod(mode)
    for link in ("my env", "link.env"):
        if link != file.name:
            (world.folder / link).symlink_to(file)
        errors = run(world, f"--env-file={link}", expect=1).stderr
        assert "can be read or written by others: chmod 600" in errors
    assert not world.calls("gcloud")


def test_an_environment_file_that_git_tracks_is_refused(world):
    file = private(world.checkout / "tokens", "HF_TOKEN=a\n")
    run(world, f"--env-file={file}")
    world.track()
    assert "is tracked by git" in run(world, f"--env-file={file}", expect=1).stderr


def test_uv_installs_python_if_the_workers_python_is_unusable(world):
    world.set(pythons=[])
    run(world)
    assert world.calls("python3", "-m", "uv", "install", "3.12")
    assert world.calls("python3.12", "-m", "venv", ".venv/tpu-3.11")  # the fake interpreter is Python 3.11
    assert world.runs() == [list(JOB)]


def test_the_interpreter_of_the_workers_can_be_chosen(world):
    run(world, "--python=python3.12")
    assert world.calls("python3.12", "-m", "venv")


@pytest.mark.parametrize("queued", [(), ("--queued",)])
def test_a_dry_run_prints_all_commands_without_executing_them(world, queued):
    options = *queued, "--env-file=my env", "--setup=echo 'a  b' # why"
    private(world.folder / "my env", "A=1\n")
    job = *JOB, "--a=it's $HOME"

    def steady(calls):  # without the parts that differ from run to run
        unstable = re.compile(r"/\S*/tmp\.\w+/|\b\d{10}-\d+-0\b")
        return {tuple(unstable.sub("", a) for a in call["arguments"]) for call in calls}

    tools = world.folder / "tools"
    tools.mkdir()
    for tool in (
        "basename",
        "bash",
        "cat",
        "cut",
        "date",
        "dirname",
        "git",
        "grep",
        "ls",
        "mktemp",
        "rm",
        "sed",
        "tail",
    ):
        (tools / tool).symlink_to(shutil.which(tool))
    output = run(world, *options, "--dry-run", job=job, PATH=str(tools)).stdout
    assert not world.calls()

    printed_only = world.environment(ONLY_RECORD="1")
    subprocess.run(["bash", "-c", f"git() {{ :; }}; tar() {{ :; }}; {output}"], env=printed_only, check=True)
    printed = steady(world.calls("gcloud"))
    (world.folder / "calls").unlink()
    run(world, *options, job=job)
    executed = steady(world.calls("gcloud"))
    assert printed <= executed
    assert {call[3] for call in executed - printed} <= {"describe"}  # a dry run does not know the answers


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("upp",),
        ("up",),
        ("up", "--name=rlhf"),
        ("up", *WHERE),
        ("up", *WHERE, "--type=v9-8"),
        ("up", *VM, "--spott"),
        ("up", *VM, "--", "x"),
        ("run", *VM),
        ("run", *VM, "--max-restarts=many", "--", "x"),
    ],
)
def test_a_wrong_command_line_ends_with_exit_code_2_and_creates_nothing(world, arguments):
    assert world.run("tpu_vm.sh", *arguments, expect=2).stderr.strip().splitlines()[-1].startswith("error: ")
    assert not world.calls("create")


def test_help_names_every_option_and_command(world):
    shown = world.run("tpu_vm.sh", "--help").stdout
    script = (ROOT / "launch" / "tpu_vm.sh").read_text()
    options = set(re.findall(r"^ +(--[a-z-]+)=?\*?\) ", script, flags=re.MULTILINE)) - {"--"}
    assert len(options) >= 13
    assert all(option in shown for option in options)
    assert all(f"\n  {command} " in shown for command in ("up", "sync", "run", "logs", "stop", "down"))
