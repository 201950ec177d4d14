# What the rules share: the checked experiment, its paths, and what must not run side by side.
from contextlib import contextmanager

from cnnlib.config import check_keys
from cnnlib.errors import UserError
from cnnlib.files import check_writable
from workflow.glue.clocks import date_now
from workflow.glue.experiment import Experiment, put_this_python_first
from workflow.glue.integrity import lines, make_again, written_by
from workflow.glue.recovery import recover
from workflow.glue.sources import code_of


@contextmanager
def told_in_one_line():
    # A WorkflowError would come with a place in this file, which says nothing about the mistake.
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


with told_in_one_line():
    check_keys(workflow.configfiles)
    EXPERIMENT = Experiment(config, workflow.config_settings.config)


pathvars:
    results=EXPERIMENT.results,


wildcard_constraints:
    dataset=r"[\w-]+",
    network=r"[\w-]+",
    stage=r"[\w-]+",
    batch_size=r"\d+",
    repeat=r"\d+",
    raw="|".join(EXPERIMENT.combined_tables),
    table="|".join(EXPERIMENT.tables),
    figure="|".join(EXPERIMENT.figures),


# Nothing else is timed while something is timed. --resources on the command line overrides both.
workflow.global_resources.setdefault("timer", 1)
workflow.global_resources.setdefault("gpu", 1)

if workflow.is_main_process and not workflow.dryrun:
    with told_in_one_line():
        date_now(["cnnlib", "kernels", "workflow", EXPERIMENT.results])

put_this_python_first()
recover(workflow)

# Jobs that Snakemake starts a process for read this too, but what they make was decided before.
if workflow.is_main_process:
    with told_in_one_line():
        AGAIN = EXPERIMENT.again()
    make_again(AGAIN)
    for line in lines(AGAIN):
        print(line, file=sys.stderr)


# Not a rule: where one job runs again, Snakemake does not look at what else changed for the jobs after
# it, and ancient() would then hide that a run's own settings did.
onstart:
    with told_in_one_line():
        EXPERIMENT.save_settings()
        EXPERIMENT.save_lists()
        check_writable(*written_by(workflow.dag))
        EXPERIMENT.begin()


onsuccess:
    with told_in_one_line():
        EXPERIMENT.end()
    EXPERIMENT.say_where()


onerror:
    with told_in_one_line():
        EXPERIMENT.end()
