# Measurements: one job for each run, one run at a time.


rule sources:
    # Checksums of the files that a stage is made of. Editing one of them measures that stage again.
    input:
        EXPERIMENT.stage_sources,
    output:
        "<results>/sources/{stage}.sha256",
    log:
        "<results>/logs/sources/{stage}.log",
    priority: EXPERIMENT.first
    localrule: True
    conda:
        "../envs/cnn.yaml"
    shell:
        "sha256sum {input:q} > {output} 2> {log}"


rule measure:
    # The order in which runs start is that of cnnlib.measuring.runs.runs, given to Snakemake as
    # priorities: all stages of one batch size, all batch sizes, then the next repeat. So the slow
    # drift of a machine hits all stages alike, and a repeat depends on no other.
    input:
        data="<results>/data/{dataset}.npz",
        sources="<results>/sources/{stage}.sha256",
    output:
        tables=multiext(
            "<results>/runs/{dataset}/{network}/{stage}/b{batch_size}/r{repeat}/",
            *[f"{raw}.csv" for raw in RUN_TABLES],
        ),
        run="<results>/runs/{dataset}/{network}/{stage}/b{batch_size}/r{repeat}/run.json",
    log:
        "<results>/logs/measure/{dataset}/{network}/{stage}/b{batch_size}/r{repeat}.log",
    priority: EXPERIMENT.priority
    conda:
        "../envs/cnn.yaml"
    # All cores, so that no other job runs while something is timed.
    threads: workflow.resource_settings.cores or 1
    resources:
        timer=1,
        gpu=EXPERIMENT.gpus,
    params:
        config=EXPERIMENT.settings_file,
        # The settings that this run depends on.
        settings=EXPERIMENT.run_settings,
        folder=subpath(output.run, parent=True),
    shell:
        "python -m workflow.glue.exclusive python -m cnnlib measure"
        " --config {params.config} --dataset {wildcards.dataset}"
        " --network {wildcards.network} --stage {wildcards.stage}"
        " --batch-size {wildcards.batch_size} --repeat {wildcards.repeat}"
        " --data {input.data} --out {params.folder} --mark 2>&1 | tee {log}"
