{{- define "latentd.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* LeaderWorkerSets may have names of 51 characters at most, with the number of the group. */}}
{{- define "latentd.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "latentd.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "latentd.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Not the LeaderWorkerSet's name: the controller makes a headless Service of that name, behind LWS_LEADER_ADDRESS. */}}
{{- define "latentd.serviceName" -}}
{{- printf "%s-grpc" (include "latentd.fullname" .) }}
{{- end }}

{{- define "latentd.selectorLabels" -}}
app.kubernetes.io/name: {{ include "latentd.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Of the pods that serve clients: all, or the leaders of the groups. */}}
{{- define "latentd.servingLabels" -}}
{{ include "latentd.selectorLabels" . }}
{{- if eq .Values.mode "group" }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- end }}
{{- end }}

{{- define "latentd.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "latentd.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "latentd.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "latentd.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "latentd.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "latentd.gpus" -}}
{{- if eq .Values.mode "group" }}{{ .Values.group.gpusPerPod }}{{ else }}{{ .Values.gpus }}{{ end }}
{{- end }}

{{/* The configuration file: the values' keys, and those that are the chart's. */}}
{{- define "latentd.config" -}}
{{- $own := dict "listen" "0.0.0.0:50051" "http_listen" "0.0.0.0:9090" "termination_log" "/dev/termination-log" "log_format" "json" }}
{{- $_ := set $own "drain_timeout" (printf "%ds" (int .Values.drainSeconds)) }}
{{- if ne .Values.model.source "demo" }}
{{- $_ := set $own "model" (trimSuffix "/" (printf "%s/%s" .Values.model.mountPath .Values.model.subPath)) }}
{{- end }}
{{- if eq .Values.mode "group" }}
{{- $_ := set $own "engine" "cuda" }}
{{- $_ := set $own "num_nodes" (int .Values.group.size) }}
{{- $_ := set $own "world_size" (mul .Values.group.size .Values.group.gpusPerPod) }}
{{- $_ := set $own "cluster_listen" "0.0.0.0:50052" }}
{{- else if gt (int .Values.gpus) 0 }}
{{- $_ := set $own "engine" "cuda" }}
{{- $_ := set $own "world_size" (int .Values.gpus) }}
{{- end }}
{{- if .Values.batch.enabled }}
{{- $_ := set $own "batch_dir" "/var/lib/latentd/batch" }}
{{- end }}
{{- range $key, $value := .Values.config }}
{{- if and (hasKey $own $key) (not (has $key (list "log_format" "engine"))) }}
{{- fail (printf "config.%s is set by the chart; see values.yaml" $key) }}
{{- end }}
{{- end }}
{{- toYaml (merge (dict) .Values.config $own) }}
{{- end }}

{{- define "latentd.podAnnotations" -}}
checksum/config: {{ include "latentd.config" . | sha256sum }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A pod's spec. Takes the root, and `role`: serve, or node. */}}
{{- define "latentd.podSpec" -}}
{{- $role := .role }}
{{- with .root }}
{{- $gpus := int (include "latentd.gpus" .) }}
serviceAccountName: {{ include "latentd.serviceAccountName" . }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ add .Values.preStopSeconds .Values.drainSeconds 20 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext: {{ toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- if .Values.topologySpreadConstraints }}
{{ toYaml .Values.topologySpreadConstraints | indent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "latentd.selectorLabels" . | nindent 8 }}
{{- end }}
{{- if eq .Values.model.source "download" }}
initContainers:
  - name: model
    image: {{ required "model.download.image is needed for model.source download" .Values.model.download.image | quote }}
    command: {{ toYaml .Values.model.download.command | nindent 6 }}
    {{- with .Values.model.download.env }}
    env: {{ toYaml . | nindent 6 }}
    {{- end }}
    securityContext: {{ toYaml .Values.securityContext | nindent 6 }}
    volumeMounts:
      - name: model
        mountPath: {{ .Values.model.mountPath }}
      - name: tmp
        mountPath: /tmp
{{- end }}
containers:
  - name: latentd
    image: {{ include "latentd.image" . | quote }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    args: [{{ $role }}, --config, /etc/latentd/latentd.yaml]
    {{- with .Values.env }}
    env: {{ toYaml . | nindent 6 }}
    {{- end }}
    {{- with .Values.envFrom }}
    envFrom: {{ toYaml . | nindent 6 }}
    {{- end }}
    {{- if eq $role "serve" }}
    ports:
      - name: grpc
        containerPort: 50051
      - name: http
        containerPort: 9090
      {{- if eq .Values.mode "group" }}
      - name: ranks
        containerPort: 50052
      {{- end }}
    # A key of health for each: "" is ready, `liveness` is alive from the moment the port opens.
    startupProbe:
      grpc:
        port: 50051
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: {{ max 1 (div (int .Values.probes.startupSeconds) 10) }}
    readinessProbe:
      grpc:
        port: 50051
      periodSeconds: {{ .Values.probes.readinessPeriodSeconds }}
      timeoutSeconds: 3
      failureThreshold: 2
    livenessProbe:
      grpc:
        port: 50051
        service: liveness
      periodSeconds: {{ .Values.probes.livenessPeriodSeconds }}
      timeoutSeconds: 5
      failureThreshold: 3
    {{- if gt (int .Values.preStopSeconds) 0 }}
    lifecycle:
      preStop:
        {{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}
        sleep:
          seconds: {{ .Values.preStopSeconds }}
        {{- else }}
        exec:
          command: [/bin/sleep, {{ .Values.preStopSeconds | quote }}]
        {{- end }}
    {{- end }}
    {{- end }}
    securityContext:
      {{- $security := deepCopy .Values.securityContext }}
      {{- if .Values.ipcLock }}
      {{- $_ := set $security "capabilities" (merge (dict "add" (list "IPC_LOCK")) (default dict $security.capabilities)) }}
      {{- end }}
      {{- toYaml $security | nindent 6 }}
    resources:
      {{- $extended := deepCopy (default dict .Values.rdma) }}
      {{- if gt $gpus 0 }}
      {{- $_ := set $extended .Values.gpuResource $gpus }}
      {{- end }}
      {{- $resources := deepCopy .Values.resources }}
      {{- $_ := set $resources "limits" (merge (dict) $extended (default dict $resources.limits)) }}
      {{- $_ := set $resources "requests" (merge (dict) $extended (default dict $resources.requests)) }}
      {{- toYaml $resources | nindent 6 }}
    volumeMounts:
      - name: config
        mountPath: /etc/latentd
        readOnly: true
      - name: tmp
        mountPath: /tmp
      {{- if gt $gpus 0 }}
      - name: shm
        mountPath: /dev/shm
      {{- end }}
      {{- if ne .Values.model.source "demo" }}
      - name: model
        mountPath: {{ .Values.model.mountPath }}
        readOnly: true
      {{- end }}
      {{- if and .Values.batch.enabled (eq $role "serve") }}
      - name: batch
        mountPath: /var/lib/latentd
      {{- end }}
      {{- with .Values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap:
      name: {{ include "latentd.fullname" . }}
  - name: tmp
    emptyDir: {}
  {{- if gt $gpus 0 }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ .Values.shmSize }}
  {{- end }}
  {{- if eq .Values.model.source "pvc" }}
  - name: model
    persistentVolumeClaim:
      claimName: {{ required "model.pvc.claimName is needed for model.source pvc" .Values.model.pvc.claimName }}
      readOnly: true
  {{- else if eq .Values.model.source "hostPath" }}
  - name: model
    hostPath:
      path: {{ required "model.hostPath.path is needed for model.source hostPath" .Values.model.hostPath.path }}
      type: Directory
  {{- else if eq .Values.model.source "download" }}
  - name: model
    {{- if kindIs "invalid" .Values.model.download.storageClassName }}
    emptyDir:
      sizeLimit: {{ .Values.model.download.size }}
    {{- else }}
    ephemeral:
      volumeClaimTemplate:
        spec: {{ include "latentd.claim" (dict "class" .Values.model.download.storageClassName "size" .Values.model.download.size) | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- if and .Values.batch.enabled (eq $role "serve") }}
  - name: batch
    persistentVolumeClaim:
      claimName: {{ default (printf "%s-batch" (include "latentd.fullname" .)) .Values.batch.existingClaim }}
  {{- end }}
  {{- with .Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The spec of a claim of one pod's own. Takes `class` and `size`. */}}
{{- define "latentd.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .class }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end }}
