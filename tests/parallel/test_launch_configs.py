"""Every file of recipes/accelerate through accelerate's own launcher, as far as the environment that it sets."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

ROOT = Path(__file__).parents[2]
FOLDER, SLURM = ROOT / "recipes" / "accelerate", ROOT / "recipes" / "slurm"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SWITCHES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def environment_of(name: str, *arguments: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes it starts, beside which they are."""
    given = ["--config_file", str(FOLDER / name), *arguments, "recipes/finetune.py", "a.yaml"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        _, environment = prepare_simple_launcher_cmd_env(args)
    return {key: value for key, value in environment.items() if key.startswith(SWITCHES)}


WANTED = {
    "one_gpu.yaml": {},
    "ddp.yaml": {},
    "cpu_ddp.yaml": {},
    "fsdp2.yaml": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
    "zero3.yaml": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                   "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"},
    "ulysses.yaml": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                     "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "PARALLELISM_CONFIG_SP_SIZE": "8"},
    "cpu_ulysses.yaml": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                         "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0", "PARALLELISM_CONFIG_SP_SIZE": "2"},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_launcher_takes_it_and_says_what_the_engines_go_by(name):
    found = environment_of(name)
    lowered = {key: value.lower() if value in ("True", "False") else value for key, value in found.items()}
    assert WANTED[name].items() <= lowered.items()
    for switch in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        assert lowered.get(switch, "false") == WANTED[name].get(switch, "false")


@pytest.mark.parametrize("name", FILES)
def test_its_head_says_the_command(name):
    text = (FOLDER / name).read_text()
    assert f"accelerate launch --config_file recipes/accelerate/{name} recipes/finetune.py" in text
    recipe = next(word for word in text.split() if word.startswith("recipes/configs/"))
    assert (ROOT / recipe).is_file()
    assert yaml.safe_load(text)["num_machines"] == 1


@pytest.mark.parametrize("path", sorted(SLURM.iterdir()), ids=lambda path: path.name)
def test_scripts_are_bash_and_name_files_that_exist(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    named = set(re.findall(r"recipes/[\w/.]*\w", path.read_text()))
    assert named and all((ROOT / word).exists() for word in named)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3", "ulysses"])
def test_torchrun_says_the_same_as_accelerate(engine, tmp_path):
    """A stand-in for torchrun prints what it was started with."""
    stand_in = tmp_path / "torchrun"
    stand_in.write_text("#!/bin/bash\nenv\necho ARGUMENTS=$*\n")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "8", "ENGINE": engine}
    for name in list(environment):
        if name.startswith(SWITCHES):
            del environment[name]
    done = subprocess.run(
        ["bash", str(SLURM / "torchrun.sh"), "a.yaml"], env=environment, capture_output=True, text=True, check=True
    )
    told = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert told["ARGUMENTS"] == "--standalone --nproc-per-node 8 recipes/finetune.py a.yaml"
    assert WANTED[f"{engine}.yaml"].items() <= told.items()


@pytest.mark.parametrize(
    ("script", "started"), [("one_node", "--num_processes 8"), ("several_nodes", "--num_machines 2")]
)
def test_a_job_that_is_told_to_leave_is_queued_again(script, started, tmp_path):
    """With stand-ins for SLURM's commands: `srun` lives until it is told to end."""
    for name, body in {
        "srun": f"echo $* > {tmp_path}/started; trap 'exit 143' TERM; touch {tmp_path}/up\nwhile :; do sleep .05; done",
        "scontrol": f'[ "$1" = show ] && echo first || echo "$*" > {tmp_path}/queued',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
                   "SLURM_JOB_NODELIST": "n"}  # fmt: skip
    job = subprocess.Popen(["bash", str(SLURM / f"{script}.sbatch"), "a.yaml"], env=environment, cwd=ROOT)
    for _ in range(200):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 143
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    told = (tmp_path / "started").read_text()
    assert "resume=auto" in told and "a.yaml" in told and (started in told or "$SLURM_NNODES" in told)
