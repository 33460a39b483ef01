"""tools/check_gpu.sh: its stages, and how it goes on. What the stages run, a GPU only can say."""

import re
import subprocess

import pytest
from compiling import ROOT

SCRIPT = ROOT / "tools" / "check_gpu.sh"


def run(*arguments):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)


@pytest.fixture
def check(tmp_path):
    """Runs stages that write to `runs`; the last needs the file `there`."""
    stages = tmp_path / "stages.txt"
    log = f"echo $RESULTS >> {tmp_path}/runs"
    stages.write_text(
        f"# a comment\n\ngood 60 {log}; echo fine\nbad 60 echo no >&2; {log}; [[ -e $RESULTS/there"
        " ]]\nslow 1 sleep 60\nskips 60 echo '== 3 skipped in 1.00s =='; exit 5\n"
        "last 60 echo '1 passed'\n"
    )

    def check(*names):
        result = run("--stages", stages, tmp_path / "results", *names)
        table = (tmp_path / "results" / "summary.txt").read_text()
        assert result.stdout.endswith(table)
        rows = [re.split(r" {2,}", line) for line in table.splitlines()[1:]]
        runs = len((tmp_path / "runs").read_text().splitlines())
        return result.returncode, {row[0]: row[1] for row in rows}, runs

    return check


def test_it_goes_on_where_stages_have_not_passed(check, tmp_path):
    status, results, runs = check()
    assert status == 1
    assert results == {
        "good": "passed",
        "bad": "FAILED, 1",
        "slow": "TOO LONG",
        "skips": "skipped",
        "last": "passed",
    }
    assert runs == 2
    (tmp_path / "results" / "there").touch()
    _, results, runs = check()
    assert results["bad"] == "passed"
    assert runs == 3
    _, results, runs = check("good")  # what is named is run again, and nothing else
    assert results["slow"] == "TOO LONG"
    assert runs == 4


def test_what_cannot_be_installed_is_not_tested(tmp_path):
    wheel = tmp_path / "no.whl"
    stages = tmp_path / "stages.txt"
    stages.write_text("any 60 true\n")
    result = run("--stages", stages, "--install", wheel, tmp_path / "results")
    assert result.returncode == 1
    assert re.search(r"^install +FAILED, 1 ", result.stdout, re.MULTILINE)
    assert re.search(r"^any +not run *$", result.stdout, re.MULTILINE)


def test_wrong_arguments(tmp_path):
    for wrong, message in [("--resume", "there is no option --resume"), ("such", "no stage such")]:
        result = run(*([wrong] if wrong.startswith("-") else [tmp_path, wrong]))
        assert result.returncode == 2
        assert message in result.stderr


def test_stages_take_nine_minutes_and_name_what_is_there():
    lines = run("--list").stdout.splitlines()
    stages = [re.fullmatch(r"(\S+) +(\d+) s  (.*)", line).groups() for line in lines]
    names = [name for name, _, _ in stages]
    assert len(set(names)) == len(names) > 10
    assert all(int(seconds) <= 540 for _, seconds, _ in stages)
    is_test = ["pytest" in command for _, _, command in stages]
    first_speed = names.index("bench")
    assert not any(is_test[first_speed:])  # bits first
    for _, _, command in stages:
        for path in re.findall(r"\b(?:tests|benchmarks|xla_ffi)/[\w/.]*\w(?=[\s\"]|$)", command):
            assert (ROOT / path).exists(), path
        for test in re.findall(r"\btest_\w+", command.partition("-k")[2]):
            tests = (ROOT / "tests" / "xla_ffi" / "test_on_gpu.py").read_text()
            assert f"def {test}(" in tests, test
