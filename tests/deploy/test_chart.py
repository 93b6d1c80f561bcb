"""The Helm chart without a cluster: what it renders for every set of values is what Kubernetes takes, by strict schemas of
several versions, and says what latentd needs. The tools come from `scripts/setup --tools`; without them it is skipped by name.
"""

import json
import pathlib
import re
import shutil
import subprocess

import pytest

yaml = pytest.importorskip('yaml', reason='PyYAML is missing')

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / 'deploy' / 'helm' / 'latentd'
VALUES = ROOT / 'tests' / 'deploy' / 'values'
SCHEMAS = ROOT / '.tools' / 'kubernetes-schemas'
LATENTD = ROOT / 'build' / 'latentd'
VERSIONS = ['1.27', '1.30', '1.34', '1.37']
SETS = sorted(file.stem for file in VALUES.glob('*.yaml'))

helm = pytest.mark.skipif(not shutil.which('helm'), reason='helm is missing')
schemas = pytest.mark.skipif(not shutil.which('kubeconform') or not SCHEMAS.exists(), reason='kubeconform or its schemas are missing')
promtool = pytest.mark.skipif(not shutil.which('promtool'), reason='promtool is missing')


def run(*command, stdin=None, ok=True) -> str:
    done = subprocess.run([str(c) for c in command], input=stdin, capture_output=True, text=True, timeout=120)
    assert not ok or done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
    return done.stdout + ('' if ok else done.stderr)


def render(*arguments, version='1.34', name='prod') -> str:
    return run('helm', 'template', name, CHART, '--namespace', 'llm', '--kube-version', version, *arguments)


def of_set(values: str, version='1.34') -> str:
    return render('--values', VALUES / f'{values}.yaml', version=version)


def objects(text: str, kind: str) -> list[dict]:
    return [o for o in yaml.safe_load_all(text) if o and o['kind'] == kind]


def only(text: str, kind: str) -> dict:
    found = objects(text, kind)
    assert len(found) == 1, (kind, found)
    return found[0]


def pod_specs(text: str) -> dict[str, dict]:
    specs = {'serve': o['spec']['template']['spec'] for o in objects(text, 'Deployment')}
    for o in objects(text, 'LeaderWorkerSet'):
        template = o['spec']['leaderWorkerTemplate']
        specs.update(serve=template['leaderTemplate']['spec'], node=template['workerTemplate']['spec'])
    return specs


def config_of(text: str) -> dict:
    maps = [o for o in objects(text, 'ConfigMap') if 'latentd.yaml' in o['data']]
    assert len(maps) == 1
    return yaml.safe_load(maps[0]['data']['latentd.yaml'])


@helm
@pytest.mark.parametrize('values', SETS)
def test_lint(values):
    run('helm', 'lint', '--strict', CHART, '--values', VALUES / f'{values}.yaml')


@helm
@schemas
@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('values', SETS)
def test_kubernetes_takes_it(values, version):
    text = of_set(values, version)
    location = '{{.ResourceKind}}{{.KindSuffix}}.json'
    run('kubeconform', '-strict', '-summary', '-schema-location', SCHEMAS / version / location, '-schema-location', SCHEMAS / 'crd' / location,
        stdin=text)


@helm
@schemas
def test_the_schemas_find_a_misspelt_field():
    """That they are strict, for Kubernetes' own kinds and for a custom one."""
    location = '{{.ResourceKind}}{{.KindSuffix}}.json'
    for old, new in [('restartPolicy: None', 'restartPolcy: None'), ('maxUnavailable: 0', 'maxUnavailabl: 0')]:
        text = of_set('two-nodes')
        assert old in text
        out = run('kubeconform', '-strict', '-schema-location', SCHEMAS / '1.34' / location, '-schema-location', SCHEMAS / 'crd' / location,
                  stdin=text.replace(old, new, 1), ok=False)
        assert new.split(':')[0] in out, out


@helm
@pytest.mark.parametrize('values', SETS)
def test_latentd_takes_the_configuration(values, tmp_path):
    """Every key is one that the daemon knows, with a value that it takes: `check` reads the very file."""
    config = config_of(of_set(values))
    assert config['listen'] == '0.0.0.0:50051' and config['http_listen'] == '0.0.0.0:9090'
    if not LATENTD.exists():
        pytest.skip('no latentd is built')
    config['model'] = str(ROOT / 'deploy' / 'configs' / 'deepseek-v3.json') if 'model' in config else ''
    file = tmp_path / 'latentd.yaml'
    file.write_text(yaml.safe_dump(config))
    out = run(LATENTD, 'check', '--config', file, '--engine', 'cpu', ok=False)
    assert not re.search(r'unknown key|is not a key|latentd.yaml:\d+', out), out


@helm
def test_defaults_serve_the_demo_model_on_a_cpu():
    text = of_set('laptop')
    spec = pod_specs(text)['serve']
    config = config_of(text)
    assert 'model' not in config and 'world_size' not in config
    assert 'nvidia.com/gpu' not in json.dumps(spec) and not objects(text, 'LeaderWorkerSet')
    assert only(text, 'Deployment')['spec']['replicas'] == 1


@helm
def test_two_nodes_of_eight():
    text = of_set('two-nodes')
    group = only(text, 'LeaderWorkerSet')
    template = group['spec']['leaderWorkerTemplate']
    assert template['size'] == 2 and template['restartPolicy'] == 'None'
    config = config_of(text)
    assert config['world_size'] == 16 and config['num_nodes'] == 2 and config['engine'] == 'cuda'
    assert 'node' not in config and 'leader' not in config  # LWS_WORKER_INDEX and LWS_LEADER_ADDRESS say it
    assert config['model'] == '/models/DeepSeek-V3'
    for role, spec in pod_specs(text).items():
        container = spec['containers'][0]
        assert container['args'][0] == role
        for kind in ('requests', 'limits'):
            assert container['resources'][kind]['nvidia.com/gpu'] == 8 and container['resources'][kind]['rdma/ib'] == 1
        assert {'name': 'shm', 'mountPath': '/dev/shm'} in container['volumeMounts']
    # `latentd node` opens no port, and a probe of it would kill it.
    assert not any('Probe' in key or key == 'ports' for key in pod_specs(text)['node']['containers'][0])
    # The controller makes a headless Service of the set's name: another one of that name would take its place.
    assert only(text, 'Service')['metadata']['name'] != group['metadata']['name']
    assert only(text, 'Service')['spec']['selector']['leaderworkerset.sigs.k8s.io/worker-index'] == '0'
    claims = {role: [v['persistentVolumeClaim']['claimName'] for v in spec['volumes'] if 'persistentVolumeClaim' in v]
              for role, spec in pod_specs(text).items()}
    assert claims == {'serve': [only(text, 'PersistentVolumeClaim')['metadata']['name']], 'node': []}


@helm
@pytest.mark.parametrize('values', SETS)
def test_probes_and_drain_fit_one_another(values):
    text = of_set(values)
    spec = pod_specs(text)['serve']
    container = spec['containers'][0]
    config = config_of(text)
    pre_stop = container['lifecycle']['preStop']['sleep']['seconds']
    drain = int(config['drain_timeout'].removesuffix('s'))
    assert spec['terminationGracePeriodSeconds'] >= pre_stop + drain + 10
    startup = container['startupProbe']
    assert startup['periodSeconds'] * startup['failureThreshold'] >= 2700
    # Named ports are refused in grpc probes; liveness must not ask for readiness.
    for probe in ('startupProbe', 'readinessProbe', 'livenessProbe'):
        assert container[probe]['grpc']['port'] == 50051
    assert container['livenessProbe']['grpc']['service'] == 'liveness'
    assert 'service' not in container['readinessProbe']['grpc']


@helm
@pytest.mark.parametrize('values', SETS)
def test_pods_fit_the_restricted_profile(values):
    """But for what the values say that they give up: host paths, and the capability to lock memory."""
    for spec in pod_specs(of_set(values)).values():
        assert spec['securityContext']['runAsNonRoot'] and spec['securityContext']['seccompProfile']['type'] == 'RuntimeDefault'
        assert not spec.get('hostNetwork') and not spec.get('hostIPC') and not spec.get('hostPID')
        for container in spec['containers'] + spec.get('initContainers', []):
            security = container['securityContext']
            assert security['allowPrivilegeEscalation'] is False and security['readOnlyRootFilesystem'] is True
            assert security['capabilities']['drop'] == ['ALL']
            added = security['capabilities'].get('add', [])
            assert added == (['IPC_LOCK'] if values == 'everything' and container['name'] == 'latentd' else [])
        paths = [v for v in spec['volumes'] if 'hostPath' in v]
        assert bool(paths) == (values == 'two-nodes')


@helm
def test_older_clusters_sleep_by_a_command():
    spec = pod_specs(of_set('laptop', version='1.27'))['serve']
    assert spec['containers'][0]['lifecycle']['preStop'] == {'exec': {'command': ['/bin/sleep', '10']}}


@helm
def test_another_configuration_is_another_pod():
    def checksum(*arguments):
        return only(render(*arguments), 'Deployment')['spec']['template']['metadata']['annotations']['checksum/config']
    assert checksum() == checksum() != checksum('--set', 'config.max_running=7')


@helm
@pytest.mark.parametrize('arguments, what', [
    (['--set', 'group.size=two'], 'got string, want integer'),
    (['--set', 'grup.size=2'], "additional properties 'grup' not allowed"),
    (['--set', 'config.listen=1.2.3.4:5'], 'config.listen is set by the chart'),
    (['--set', 'model.source=pvc'], 'model.pvc.claimName is needed'),
    (['--set', 'batch.enabled=true', '--set', 'replicas=2'], 'batch.enabled needs replicas 1'),
    (['--set', 'group.restartPolicy=Always'], 'value must be one of'),
])
def test_bad_values_are_refused(arguments, what):
    assert what in run('helm', 'template', 'x', CHART, '--kube-version', '1.34', *arguments, ok=False)


@helm
def test_names():
    assert only(render(name='latentd'), 'Deployment')['metadata']['name'] == 'latentd'
    assert only(render(name='prod'), 'Deployment')['metadata']['name'] == 'prod-latentd'
    long = only(render('--values', VALUES / 'two-nodes.yaml', name='a' * 53), 'LeaderWorkerSet')['metadata']['name']
    assert len(long) <= 40


@helm
def test_network_policy_names_who_may_come_in():
    rules = only(of_set('everything'), 'NetworkPolicy')['spec']['ingress']
    assert [r.get('ports') for r in rules] == [[{'port': 50051}], [{'port': 9090}], None]
    assert all('from' in r for r in rules)


@promtool
def test_alert_rules():
    run('promtool', 'check', 'rules', CHART / 'files' / 'alerts.yaml')
    run('promtool', 'test', 'rules', ROOT / 'tests' / 'deploy' / 'alerts_test.yaml')


def alert_names() -> set[str]:
    groups = yaml.safe_load((CHART / 'files' / 'alerts.yaml').read_text())['groups']
    return {rule['alert'] for group in groups for rule in group['rules']}


def test_every_alert_is_in_the_run_book():
    book = (ROOT / 'deploy' / 'README.md').read_text()
    assert {name for name in alert_names() if f'`{name}`' not in book} == set()


def test_every_alert_is_tested():
    tests = (ROOT / 'tests' / 'deploy' / 'alerts_test.yaml').read_text()
    assert {name for name in alert_names() if name not in tests} == set()


def metric_names() -> set[str]:
    """Those that the daemon writes; histograms have three series."""
    source = ''.join(file.read_text() for file in ROOT.glob('server/**/*.cc'))
    names = set(re.findall(r'"((?:latentd|process)_[a-z0-9_]+)"', source))
    return names | {name + suffix for name in names for suffix in ('_bucket', '_sum', '_count')}


@pytest.mark.parametrize('file', ['alerts.yaml', 'dashboard.json'])
def test_expressions_are_of_metrics_that_there_are(file):
    text = (CHART / 'files' / file).read_text()
    used = set(re.findall(r'\b((?:latentd|process)_[a-z0-9_]+)', re.sub(r'uid": "latentd"', '', text)))
    assert used and used - metric_names() == set()


def test_the_dashboard_is_what_its_script_makes():
    assert run(ROOT / 'scripts' / 'make_dashboard.py') == (CHART / 'files' / 'dashboard.json').read_text()


@promtool
def test_the_dashboards_expressions_parse(tmp_path):
    board = json.loads((CHART / 'files' / 'dashboard.json').read_text())
    expressions = [t['expr'] for panel in board['panels'] for t in panel.get('targets', [])]
    assert len(expressions) > 30
    rules = [{'record': f'panel:{i}', 'expr': e.replace('$__rate_interval', '5m')} for i, e in enumerate(expressions)]
    file = tmp_path / 'rules.yaml'
    file.write_text(yaml.safe_dump({'groups': [{'name': 'panels', 'rules': rules}]}))
    run('promtool', 'check', 'rules', file)
