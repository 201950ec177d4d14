# What a call makes again although no input of it has changed, and what precedes and follows the jobs.

MADE = EXPERIMENT.located(
    *(path for raw in ("transfers", "cpu_profile", "race") for path in ROWS[raw]),
    *collect("<results>/tables/{raw}.csv", raw=[*ROWS, *BESIDE]),
    *rules.tables.input,
    *rules.figures.input,
    *rules.page.output,
)

# Jobs that Snakemake starts a process for read this too, but what they make was decided before.
if workflow.is_main_process:
    with exit_on_user_error():
        AGAIN = EXPERIMENT.again(MADE)
    make_again(AGAIN)
    for line in lines(AGAIN):
        print(line, file=sys.stderr)


# Not a rule: where one job runs again, Snakemake does not look at what else changed for the jobs after
# it, and ancient() would then hide that a run's own settings did.
onstart:
    with exit_on_user_error():
        EXPERIMENT.save_settings()
        EXPERIMENT.save_own_stages()
        EXPERIMENT.save_lists(ROWS)
        check_writable(*written_by(workflow.dag))
        EXPERIMENT.begin()


onsuccess:
    with exit_on_user_error():
        EXPERIMENT.end()
    EXPERIMENT.say_where(rules.figures.input)


onerror:
    with exit_on_user_error():
        EXPERIMENT.end()
