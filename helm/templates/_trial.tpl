{{/* Parts for trying out. */}}

{{- define "lorary.trial.s3Url" -}}
http://{{ include "lorary.fullname" . }}-trial-s3.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:8333
{{- end -}}

{{/* What an entry of a Secret already is, so that an upgrade keeps it; else the given value. (dict "root" $ "secret" "..." "key" "..." "new" "...") */}}
{{- define "lorary.trial.kept" -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .secret -}}
{{- $data := default dict $found.data -}}
{{- if hasKey $data .key -}}
{{ index $data .key | b64dec }}
{{- else -}}
{{ .new }}
{{- end -}}
{{- end -}}

{{- define "lorary.trial.secretHead" -}}
apiVersion: v1
kind: Secret
metadata:
  name: {{ include "lorary.fullname" .root }}-trial-{{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "lorary.labels" (dict "root" .root "component" (printf "trial-%s" .name)) | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep
type: Opaque
{{- end -}}

{{/* Another user than ours: the official images have files of their own one. (user id) */}}
{{- define "lorary.trial.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ . }}
  runAsGroup: {{ . }}
  fsGroup: {{ . }}
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "lorary.trial.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ . }}
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lorary.trial.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "lorary.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "lorary.labels" . | nindent 4 }}
spec:
  selector: {{- include "lorary.selector" . | nindent 4 }}
  ports:
    - {name: {{ .port }}, port: {{ .number }}, targetPort: {{ .port }}, protocol: TCP}
{{- end -}}

{{/* Who may come in: pods of this release. Nobody goes out. */}}
{{- define "lorary.trial.policy" -}}
{{- if .root.Values.networkPolicy.enabled }}
---
{{ include "lorary.policyHead" . }}
  ingress:
    - ports:
        - {protocol: TCP, port: {{ .port }}}
      from:
        - podSelector:
            matchLabels:
              app.kubernetes.io/instance: {{ .root.Release.Name }}
  egress: []
{{- end }}
{{- end -}}
