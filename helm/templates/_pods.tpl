{{/* What all pods have in common. */}}

{{/* The restricted profile of Kubernetes' Pod Security Standards, and a user that no image has files of. */}}
{{- define "lorary.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lorary.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/*
Fields of a pod beside its containers. (dict "root" $ "component" "api" "account" "api" "values" .Values.api)
enableServiceLinks: a Service named lorary-runtime would put LORARY_RUNTIME_PORT=tcp://... among our settings.
*/}}
{{- define "lorary.podFields" -}}
serviceAccountName: {{ include "lorary.serviceAccountName" (dict "root" .root "account" .account) }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "lorary.podSecurity" . | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "lorary.spread" -}}
topologySpreadConstraints:
  {{- if .values.topologySpreadConstraints }}
  {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "lorary.selector" . | nindent 8 }}
  {{- end }}
{{- end -}}

{{/* `scraped` pods answer at the port `metrics`. */}}
{{- define "lorary.podMetadata" -}}
labels:
  {{- include "lorary.labels" (dict "root" .root "component" .component) | nindent 2 }}
  {{- if .scraped }}
  lorary/metrics: "true"
  {{- end }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Requests, limits and GPUs, which are asked for as limits. (dict "values" $worker) */}}
{{- define "lorary.resources" -}}
{{- $resources := deepCopy .values.resources -}}
{{- if .values.gpu.count -}}
{{- $_ := set $resources "limits" (set (default dict $resources.limits) .values.gpu.resource .values.gpu.count) -}}
{{- end -}}
{{ toYaml $resources }}
{{- end -}}

{{/* Writable places: the state directory and temporary files. */}}
{{- define "lorary.scratchMounts" -}}
- name: state
  mountPath: /var/lib/lorary
- name: tmp
  mountPath: /tmp
{{- end -}}

{{- define "lorary.scratchVolumes" -}}
- name: state
  emptyDir:
    sizeLimit: {{ . }}
- name: tmp
  emptyDir:
    sizeLimit: {{ . }}
{{- end -}}

{{/* Waits until the migrate Job, or whoever runs `lorary db init`, has made the schema. A hook would deadlock: see README. */}}
{{- define "lorary.waitForSchema" -}}
- name: wait-for-schema
  image: {{ include "lorary.image" (dict "root" .root "image" .image) }}
  imagePullPolicy: {{ (index .root.Values.images .image).pullPolicy }}
  args: [db, wait, --timeout, {{ .values.waitForSchemaS | quote }}]
  env: {{- include "lorary.env" .root | nindent 4 }}
  resources: {{- toYaml .root.Values.migrate.resources | nindent 4 }}
  securityContext: {{- include "lorary.containerSecurity" . | nindent 4 }}
  volumeMounts:
    {{- include "lorary.scratchMounts" . | nindent 4 }}
    {{- include "lorary.secretsMount" . | nindent 4 }}
{{- end -}}

{{/* Copies a base model from a hub into the model cache. (dict "root" $ "runtime" $runtime) */}}
{{- define "lorary.fetchModel" -}}
{{- $fetch := .runtime.model.fetch -}}
- name: fetch-model
  image: {{ include "lorary.image" (dict "root" .root "image" "worker") }}
  imagePullPolicy: {{ .root.Values.images.worker.pullPolicy }}
  command: [hf]
  args: [download, {{ $fetch.repository | quote }}, --revision, {{ $fetch.revision | quote }}, --local-dir, {{ .path | quote }}]
  env:
    - {name: HOME, value: /tmp}
    - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
    {{- with $fetch.endpoint }}
    - {name: HF_ENDPOINT, value: {{ . | quote }}}
    {{- end }}
    {{- if $fetch.tokenSecret }}
    - {name: HF_TOKEN_PATH, value: /run/secrets/hub/token}
    {{- end }}
  resources: {{- toYaml .root.Values.migrate.resources | nindent 4 }}
  securityContext: {{- include "lorary.containerSecurity" . | nindent 4 }}
  volumeMounts:
    {{- include "lorary.scratchMounts" . | nindent 4 }}
    - name: models
      mountPath: {{ .root.Values.modelCache.mountPath }}
    {{- if $fetch.tokenSecret }}
    - name: hub-token
      mountPath: /run/secrets/hub
      readOnly: true
    {{- end }}
{{- end -}}

{{- define "lorary.modelCacheVolume" -}}
- name: models
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "lorary.fullname" .)) .Values.modelCache.existingClaim }}
{{- end -}}
