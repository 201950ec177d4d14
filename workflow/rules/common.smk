# What the rules share: the checked experiment, its paths, and what must not run side by side.
from cnnlib.config_files import check_keys
from cnnlib.files import check_writable
from workflow.glue.clocks import date_now
from workflow.glue.experiment import (
    BESIDE,
    RUN_TABLES,
    Experiment,
    put_this_python_first,
)
from workflow.glue.integrity import lines, make_again, written_by
from workflow.glue.polling import look_once_in_a_while
from workflow.glue.program import exit_on_user_error, keep_what_is_imported
from workflow.glue.recovery import recover
from workflow.glue.sources import code_of
from workflow.report import PUBLISHED, page_parts

keep_what_is_imported()

# A WorkflowError would name a line of this file, which says nothing about the mistake.
with exit_on_user_error():
    check_keys(workflow.configfiles)
    EXPERIMENT = Experiment(config, workflow.config_settings.config)

SWEEP, RACE = EXPERIMENT.config.sweep, EXPERIMENT.config.race


pathvars:
    results=EXPERIMENT.results,


wildcard_constraints:
    dataset=r"[\w-]+",
    network=r"[\w-]+",
    stage=r"[\w-]+",
    batch_size=r"\d+",
    repeat=r"\d+",
    table="|".join(EXPERIMENT.tables),
    figure="|".join(EXPERIMENT.figures),


# Nothing else is timed while something is timed. --resources on the command line overrides both.
workflow.global_resources.setdefault("timer", 1)
workflow.global_resources.setdefault("gpu", 1)

if workflow.is_main_process and not workflow.dryrun:
    with exit_on_user_error():
        date_now(["cnnlib", "kernels", "workflow", EXPERIMENT.results])

put_this_python_first()
look_once_in_a_while()
recover(workflow)
