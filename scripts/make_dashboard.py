#!/usr/bin/env python3
"""Writes Grafana's dashboard of latentd: deploy/helm/latentd/files/dashboard.json. Panels are listed here, as rows of
(title, unit, [(expression, legend)]); $instance is the variable that chooses daemons.

    scripts/make_dashboard.py > deploy/helm/latentd/files/dashboard.json
"""

import json

BY = '{instance=~"$instance"}'


def rate(name: str, labels: str = '') -> str:
    return f'rate({name}{{instance=~"$instance"{labels}}}[$__rate_interval])'


def quantiles(name: str, labels: str = '') -> list[tuple[str, str]]:
    return [(f'histogram_quantile({q}, sum by (le) ({rate(name + "_bucket", labels)}))', f'p{100 * q:g}') for q in (0.5, 0.9, 0.99)]


ROWS = [
    ('State', [
        ('State', 'short', [(f'latentd_state{BY} == 1', '{{instance}} {{state}}')]),
        ('Ready', 'bool', [(f'latentd_ready{BY}', '{{instance}} ready'), (f'latentd_alive{BY}', '{{instance}} alive')]),
        ('Loaded', 'percentunit', [(f'latentd_load_bytes_loaded{BY} / latentd_load_bytes_expected{BY}', '{{instance}}')]),
        ('Ranks', 'short', [(f'sum by (instance, state) (latentd_rank_state{BY})', '{{instance}} {{state}}')]),
    ]),
    ('What clients see', [
        ('Calls a second', 'reqps', [(f'sum by (method, grpc_code) ({rate("latentd_requests_total")})', '{{method}} {{grpc_code}}')]),
        ('Time to first token', 's', quantiles('latentd_time_to_first_token_seconds')),
        ('Between tokens', 's', quantiles('latentd_inter_token_latency_seconds')),
        ('Whole calls', 's', quantiles('latentd_request_duration_seconds')),
        ('Refused at the door', 'reqps', [(f'sum by (reason) ({rate("latentd_admission_rejections_total")})', '{{reason}}')]),
        ('Clients that went away', 'reqps', [(rate('latentd_client_cancelled_total'), '{{instance}}')]),
    ]),
    ('Load', [
        ('Tokens a second', 'short', [(f'sum({rate("latentd_generation_tokens_total")})', 'drawn'),
                                      (f'sum({rate("latentd_prompt_tokens_total")})', 'of prompts'),
                                      (f'sum({rate("latentd_prompt_tokens_cached_total")})', 'of those from the cache')]),
        ('Requests', 'short', [(f'latentd_requests_running{BY}', '{{instance}} running'), (f'latentd_requests_waiting{BY}', '{{instance}} waiting')]),
        ('Queue', 's', quantiles('latentd_queue_seconds')),
        ('KV cache in use', 'percentunit', [(f'latentd_kv_cache_usage_ratio{BY}', '{{instance}}')]),
        ('Prompt tokens found in the cache', 'percentunit',
         [(f'sum({rate("latentd_prompt_tokens_cached_total")}) / sum({rate("latentd_prompt_tokens_total")})', 'share')]),
        ('Preemptions a second', 'short', [(rate('latentd_preemptions_total'), '{{instance}}')]),
        ('Prompts, tokens', 'short', quantiles('latentd_request_prompt_tokens')),
        ('Answers, tokens', 'short', quantiles('latentd_request_generation_tokens')),
    ]),
    ('Engine', [
        ('Decode step', 's', quantiles('latentd_step_seconds', ', kind="decode"')),
        ('Step with prompts', 's', quantiles('latentd_step_seconds', ', kind="prefill"')),
        ('Sequences of a step', 'short', quantiles('latentd_step_sequences')),
        ('Tokens of a step', 'short', quantiles('latentd_step_tokens')),
        ('GPU waits between steps', 's', quantiles('latentd_device_idle_seconds')),
        ('Planning and booking', 's', quantiles('latentd_scheduler_seconds')),
    ]),
    ('Group of ranks', [
        ('Formings', 'short', [(f'latentd_group_formings_total{BY}', '{{instance}}')]),
        ('Ranks lost in an hour', 'short', [(f'sum by (reason) (increase(latentd_ranks_lost_total{BY}[1h]))', '{{reason}}')]),
        ('Latest recovery', 's', [(f'latentd_group_recovery_seconds{BY}', '{{instance}}')]),
        ('Sequences computed again', 'short', [(rate('latentd_sequences_recovered_total'), '{{instance}}')]),
    ]),
    ('Batch jobs', [
        ('Jobs', 'short', [(f'sum by (state) (latentd_batch_jobs{BY})', '{{state}}')]),
        ('Items a second', 'short', [(f'sum by (state) ({rate("latentd_batch_items_total")})', '{{state}}')]),
        ('Items', 'short', [(f'latentd_batch_items_running{BY}', '{{instance}} running'), (f'latentd_batch_items_pending{BY}', '{{instance}} pending')]),
        ('Age of the oldest backlog', 's', [(f'latentd_batch_oldest_pending_age_seconds{BY}', '{{instance}}')]),
        ('Until the next job expires', 's', [(f'latentd_batch_deadline_slack_seconds{BY}', '{{instance}}')]),
        ('A commit', 's', quantiles('latentd_batch_commit_seconds')),
        ('Size of the store', 'bytes', [(f'latentd_batch_store_bytes{BY}', '{{instance}}')]),
        ('Failed, jobs taken up again', 'short', [(f'latentd_batch_store_failed{BY}', '{{instance}} failed'),
                                                  (f'latentd_batch_recoveries_total{BY}', '{{instance}} jobs')]),
    ]),
    ('Process', [
        ('CPU', 'short', [(rate('process_cpu_seconds_total'), '{{instance}}')]),
        ('Memory', 'bytes', [(f'process_resident_memory_bytes{BY}', '{{instance}}')]),
    ]),
]


def panels():
    identity = 0
    y = 0
    for title, row in ROWS:
        identity += 1
        yield {'id': identity, 'type': 'row', 'title': title, 'collapsed': False, 'panels': [], 'gridPos': {'x': 0, 'y': y, 'w': 24, 'h': 1}}
        y += 1
        for i, (name, unit, targets) in enumerate(row):
            identity += 1
            yield {
                'id': identity, 'type': 'timeseries', 'title': name, 'datasource': {'type': 'prometheus', 'uid': '${datasource}'},
                'gridPos': {'x': i % 3 * 8, 'y': y + i // 3 * 8, 'w': 8, 'h': 8},
                'fieldConfig': {'defaults': {'unit': unit, 'min': 0, 'custom': {'fillOpacity': 10, 'showPoints': 'never'}}, 'overrides': []},
                'options': {'legend': {'displayMode': 'list', 'placement': 'bottom'}, 'tooltip': {'mode': 'multi'}},
                'targets': [{'refId': chr(ord('A') + k), 'expr': expression, 'legendFormat': legend,
                             'datasource': {'type': 'prometheus', 'uid': '${datasource}'}} for k, (expression, legend) in enumerate(targets)],
            }
        y += (len(row) + 2) // 3 * 8


def main():
    variables = [
        {'name': 'datasource', 'type': 'datasource', 'query': 'prometheus', 'label': 'Data source'},
        {'name': 'instance', 'type': 'query', 'label': 'Daemon', 'datasource': {'type': 'prometheus', 'uid': '${datasource}'},
         'query': 'label_values(latentd_build_info, instance)', 'refresh': 2, 'includeAll': True, 'multi': True,
         'current': {'text': 'All', 'value': '$__all'}},
    ]
    print(json.dumps({
        'uid': 'latentd', 'title': 'latentd', 'tags': ['latentd', 'llm'], 'schemaVersion': 39, 'version': 1, 'editable': True,
        'refresh': '30s', 'time': {'from': 'now-1h', 'to': 'now'}, 'templating': {'list': variables}, 'panels': list(panels()),
    }, indent=1))


if __name__ == '__main__':
    main()
