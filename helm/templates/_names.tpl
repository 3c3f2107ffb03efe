{{/* Names, labels, images, accounts. */}}

{{- define "lorary.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of one component; never changes over releases. (dict "root" $ "component" "api") */}}
{{- define "lorary.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of every resource. (dict "root" $ "component" "api") */}}
{{- define "lorary.labels" -}}
{{ include "lorary.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: lorary
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* (dict "root" $ "image" "api") */}}
{{- define "lorary.image" -}}
{{- $image := index .root.Values.images .image -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $image.repository $image.digest }}
{{- else -}}
{{ printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "account" "api") */}}
{{- define "lorary.serviceAccountName" -}}
{{- $account := index .root.Values.serviceAccounts .account -}}
{{- if $account.create -}}
{{ default (printf "%s-%s" (include "lorary.fullname" .root) .account) $account.name }}
{{- else -}}
{{ default "default" $account.name }}
{{- end -}}
{{- end -}}

{{- define "lorary.serviceAccount" -}}
{{- $account := index .root.Values.serviceAccounts .account -}}
{{- if $account.create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "lorary.serviceAccountName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "lorary.labels" (dict "root" .root "component" .account) | nindent 4 }}
  {{- with $account.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}
{{- end -}}

{{/* The registry inside the cluster. */}}
{{- define "lorary.url" -}}
http://{{ include "lorary.fullname" . }}-api.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.api.service.port }}
{{- end -}}

{{/* (dict "root" $ "part" "worker" "name" "gpu"): <fullname>-worker-gpu */}}
{{- define "lorary.partName" -}}
{{ printf "%s-%s-%s" (include "lorary.fullname" .root) .part .name | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{/* The entries of `workers` over their defaults, as JSON; those that are null are taken away. */}}
{{- define "lorary.workers" -}}
{{ include "lorary.entries" (list .Values.workerDefaults .Values.workers) }}
{{- end -}}

{{/* The same of `runtimes`. */}}
{{- define "lorary.runtimes" -}}
{{ include "lorary.entries" (list .Values.runtimeDefaults .Values.runtimes) }}
{{- end -}}

{{/* (list defaults entries) */}}
{{- define "lorary.entries" -}}
{{- $defaults := index . 0 -}}
{{- $out := dict -}}
{{- range $name, $entry := index . 1 -}}
{{- if not (kindIs "invalid" $entry) -}}
{{- $_ := set $out $name (mustMergeOverwrite (deepCopy $defaults) (deepCopy $entry)) -}}
{{- end -}}
{{- end -}}
{{ toJson $out }}
{{- end -}}
