#!/usr/bin/env python3
"""Makes JSON schemas by which kubeconform judges what the chart renders, without a cluster: Kubernetes' own from the
package kubernetes-validate, those of custom resources from the definitions in their Go modules. Both are strict: a field
that nobody knows is an error.

    scripts/make_kubernetes_schemas.py OUTPUT KUBERNETES_VERSION... -- CRD.yaml...

OUTPUT/VERSION/KIND-GROUP-APIVERSION.json and OUTPUT/crd/KIND-GROUP-APIVERSION.json.
"""

import json
import pathlib
import sys

import kubernetes_validate
import yaml

# What charts of ours render.
KINDS = ['configmap-v1', 'deployment-apps-v1', 'networkpolicy-networking-v1', 'persistentvolumeclaim-v1', 'pod-v1',
         'poddisruptionbudget-policy-v1', 'service-v1', 'serviceaccount-v1']


def point_inward(node):
    """References to the package's file of definitions become references into the document itself."""
    if isinstance(node, dict):
        return {key: '#/$defs/' + value.split('/')[-1] if key == '$ref' and isinstance(value, str) else point_inward(value)
                for key, value in node.items()}
    return [point_inward(value) for value in node] if isinstance(node, list) else node


def references(node, definitions, found):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == '$ref' and isinstance(value, str):
                name = value.split('/')[-1]
                if name not in found:
                    found.add(name)
                    references(definitions[name], definitions, found)
            else:
                references(value, definitions, found)
    elif isinstance(node, list):
        for value in node:
            references(value, definitions, found)


def core(source: pathlib.Path, output: pathlib.Path):
    definitions = json.loads((source / '_definitions.json').read_text())
    definitions = definitions.get('$defs') or definitions['definitions']
    output.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        file = source / f'{kind}.json'
        schema = json.loads(file.read_text())
        needed = set()
        references(schema, definitions, needed)
        schema = point_inward(schema)
        schema['$defs'] = {name: point_inward(definitions[name]) for name in needed}
        schema.pop('$id', None)
        (output / file.name).write_text(json.dumps(schema))


def strict(node):
    if isinstance(node, dict):
        if (node.get('type') == 'object' and 'properties' in node and 'additionalProperties' not in node
                and not node.get('x-kubernetes-preserve-unknown-fields')):
            node['additionalProperties'] = False
        if node.get('x-kubernetes-int-or-string'):
            node.pop('type', None)
            node['anyOf'] = [{'type': 'integer'}, {'type': 'string'}]
        for value in node.values():
            strict(value)
    elif isinstance(node, list):
        for value in node:
            strict(value)


def custom(file: pathlib.Path, output: pathlib.Path):
    output.mkdir(parents=True, exist_ok=True)
    for definition in yaml.safe_load_all(file.read_text()):
        if not definition or definition.get('kind') != 'CustomResourceDefinition':
            continue
        spec = definition['spec']
        for version in spec['versions']:
            schema = version['schema']['openAPIV3Schema']
            strict(schema)
            schema['properties'].update(apiVersion={'type': 'string'}, kind={'type': 'string'}, metadata={'type': 'object'})
            name = f'{spec["names"]["kind"].lower()}-{spec["group"].split(".")[0]}-{version["name"]}.json'
            (output / name).write_text(json.dumps(schema))


def main():
    if '--' not in sys.argv or len(sys.argv) < 4:
        sys.exit(__doc__)
    output = pathlib.Path(sys.argv[1])
    split = sys.argv.index('--')
    package = pathlib.Path(kubernetes_validate.__file__).parent
    for version in sys.argv[2:split]:
        # 1.34 -> the newest 1.34.x that the package has.
        sources = sorted(package.glob(f'**/v{version}.*-local-strict'))
        if not sources:
            sys.exit(f'kubernetes-validate has no schemas of {version}')
        core(sources[-1], output / version)
    for file in sys.argv[split + 1:]:
        custom(pathlib.Path(file), output / 'crd')


if __name__ == '__main__':
    main()
