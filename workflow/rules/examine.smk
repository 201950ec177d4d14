# Measured beside the runs, once: the machine's own limits, what transfers cost, where CPU stages
# spend their time, what a trained network looks like.

# Where tables are given (results/reference/*), these are among them.
if not EXPERIMENT.tables_are_given:

    rule probe:
        input:
            code=code_of("cnnlib/probes/__init__.py", "kernels/probes.cuh"),
        output:
            update("<results>/tables/probes.csv"),
        log:
            "<results>/logs/probe.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
            gpu=int(EXPERIMENT.may_use_gpu),
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.sections("measuring"),
        shell:
            "python -m workflow.glue.exclusive python -m cnnlib probe"
            " --config {params.config} --out {output} 2>&1 | tee {log}"

    rule pictures:
        input:
            data=collect("<results>/data/{dataset}.npz", dataset=SWEEP.datasets),
            code=code_of("cnnlib/measuring/learning_curve.py"),
        output:
            update("<results>/tables/pictures.csv"),
        log:
            "<results>/logs/pictures.log",
        conda:
            "../envs/cnn.yaml"
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.sections("datasets"),
        shell:
            "python -m cnnlib pictures --config {params.config} --out {output} 2>&1 | tee {log}"

    rule features:
        input:
            data=collect("<results>/data/{dataset}.npz", dataset=SWEEP.datasets),
            sources="<results>/sources/gemm.sha256",
            code=code_of("cnnlib/measuring/feature_maps.py"),
        output:
            update("<results>/tables/features.csv"),
        log:
            "<results>/logs/features.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.sections("training", "networks"),
        shell:
            "python -m cnnlib features --config {params.config} --out {output} 2>&1 | tee {log}"

    rule race:
        input:
            data=collect(
                "<results>/data/{dataset}.npz", dataset=RACE.dataset if RACE else "-"
            ),
            sources="<results>/sources/{stage}.sha256",
            code=code_of("cnnlib/measuring/race.py"),
        output:
            update("<results>/race/{stage}.csv"),
        log:
            "<results>/logs/race/{stage}.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
            gpu=EXPERIMENT.gpus,
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.race_settings,
        shell:
            "python -m workflow.glue.exclusive python -m cnnlib race --config {params.config}"
            " --stage {wildcards.stage} --data {input.data} --out {output} 2>&1 | tee {log}"

    rule transfers:
        input:
            data="<results>/data/{dataset}.npz",
            sources="<results>/sources/{stage}.sha256",
            code=code_of("cnnlib/measuring/transfers.py"),
        output:
            update("<results>/transfers/{dataset}/{network}/{stage}.csv"),
        log:
            "<results>/logs/transfers/{dataset}/{network}/{stage}.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
            gpu=EXPERIMENT.gpus,
        params:
            command="transfers",
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.run_settings,
            batch_size=EXPERIMENT.usual_batch_size,
        shell:
            "python -m workflow.glue.exclusive python -m cnnlib {params.command}"
            " --config {params.config} --dataset {wildcards.dataset}"
            " --network {wildcards.network} --stage {wildcards.stage}"
            " --batch-size {params.batch_size} --data {input.data} --out {output} 2>&1 | tee {log}"

    use rule transfers as cpu_profile with:
        input:
            data="<results>/data/{dataset}.npz",
            sources="<results>/sources/{stage}.sha256",
            code=code_of("cnnlib/measuring/cpu_profile.py"),
        output:
            update("<results>/cpu_profile/{dataset}/{network}/{stage}.csv"),
        log:
            "<results>/logs/cpu_profile/{dataset}/{network}/{stage}.log",
        params:
            command="cpu-profile",
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.run_settings,
            batch_size=EXPERIMENT.usual_batch_size,
