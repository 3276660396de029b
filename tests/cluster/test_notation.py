"""Times and seeds in every form in which people write them for a scheduler."""

import pytest

from safetynet.cluster import notation, sweep_grid, sweep_place, template
from safetynet.cluster.submit import seeds_of
from safetynet.errors import InputError

ALIKE = {
    "08:00:00": "08:00:00",
    "8:00:00": "08:00:00",
    "100:00:09": "100:00:09",
    "59:08": "00:59:08",
    "90:00": "01:30:00",
    "1-2": "26:00:00",
    "7-00": "168:00:00",
    "1-02:30": "26:30:00",
    "1-00:00:00": "24:00:00",
    "0-1:2:3": "01:02:03",
}
NONE = (
    "",
    "8h",
    "0",
    "00:00:00",
    "08:61:00",
    "08:00:61",
    "1-24",
    "1-",
    "-5",
    "1:2:3:4",
    "1.5",
    "UNLIMITED",
    "²",
)


@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
@pytest.mark.parametrize("written", ALIKE)
def test_a_wall_time_is_read_in_each_form_of_the_schedulers(written, scheduler):
    assert notation.walltime(written, scheduler) == ALIKE[written]
    assert (
        template.PACKAGED["miniature"].changed(walltime=written, scheduler=scheduler).walltime
        == ALIKE[written]
    )


def test_a_number_alone_is_what_its_scheduler_takes_it_for():
    assert notation.walltime("90", "slurm") == "01:30:00"
    assert notation.walltime("90", "pbs") == "00:01:30"


@pytest.mark.parametrize("written", NONE)
def test_what_is_no_wall_time_is_refused_with_the_forms_of_one(written):
    for scheduler in ("slurm", "pbs"):
        with pytest.raises(
            InputError, match=r"hours:minutes:seconds, such as .* minutes for Slurm and seconds for"
        ):
            template.PACKAGED["miniature"].changed(walltime=written, scheduler=scheduler)


def test_the_place_of_a_sweep_takes_the_same_forms(tmp_path):
    file = tmp_path / "place.yaml"
    assert sweep_place.Place(scheduler="slurm", walltime="1-12").walltime == "36:00:00"
    assert sweep_place.Place(scheduler="torque", walltime="5400").walltime == "01:30:00"
    file.write_text("walltime: 12:00:00\n")  # which YAML takes for a number
    with pytest.raises(InputError, match="walltime: Input should be a valid string"):
        sweep_place.load(file)
    file.write_text('walltime: "half a day"\n')
    with pytest.raises(InputError, match=r"walltime: .*write it in quotes as hours:minutes:seconds"):
        sweep_place.load(file)


@pytest.mark.parametrize(
    ("written", "seeds"),
    [
        ("0:5", (0, 1, 2, 3, 4)),
        ("0-4", (0, 1, 2, 3, 4)),
        ("0-8:4", (0, 4, 8)),
        ("0,2,5", (0, 2, 5)),
        ("7, 0:2", (0, 1, 7)),
    ],
)
def test_seeds_are_read_in_each_form_by_jobs_and_by_sweeps(written, seeds):
    assert seeds_of(written) == seeds
    assert sorted(notation.seeds(written)) == list(seeds)


@pytest.mark.parametrize("written", ["0,0", "0:3,2", "5-0", "0--4", "0-4%2", "1,,2", ",", "0-4:0"])
def test_seeds_that_are_none_or_named_twice_are_refused_with_the_forms_of_them(written):
    with pytest.raises(
        InputError, match=r"write start:stop, such as 0:5 for seeds 0 to 4, or 0-4 .*, or 0,2,5"
    ):
        seeds_of(written)
    with pytest.raises(InputError, match=r"--seeds .*: write first:end"):
        sweep_grid.points(template.BODY, seeds=written)
