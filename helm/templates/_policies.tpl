{{/* Budgets and network policies, one a component. */}}

{{/* (dict "root" $ "component" "api" "name" "x-api" "pdb" .Values.api.pdb "pods" 2) */}}
{{- define "lorary.pdb" -}}
{{- if and .pdb.enabled (gt (int .pods) 1) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "lorary.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .pdb.maxUnavailable }}
  {{- /* a pod that is not ready must not hold up the draining of its node */}}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "lorary.selector" . | nindent 6 }}
{{- end -}}
{{- end -}}

{{- define "lorary.policyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "lorary.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "lorary.labels" . | nindent 4 }}
spec:
  podSelector:
    matchLabels: {{- include "lorary.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end -}}

{{/* Who reads metrics, at the port `metrics`. */}}
{{- define "lorary.ingressMetrics" -}}
{{- with .Values.networkPolicy.metricsFrom -}}
- ports:
    - {protocol: TCP, port: metrics}
  from: {{- toYaml . | nindent 4 }}
{{- end -}}
{{- end -}}

{{/* An egress rule. (dict "to" list-of-peers "ports" (list 443)) */}}
{{- define "lorary.egress" -}}
- ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with .to }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "lorary.egressDns" -}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
  {{- with .Values.networkPolicy.dnsTo }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "lorary.egressDatabase" -}}
{{- with .Values.networkPolicy.egress -}}
{{ include "lorary.egress" (dict "to" .databaseTo "ports" .databasePorts) }}
{{- end -}}
{{- end -}}

{{- define "lorary.egressBroker" -}}
{{- if or .Values.broker.existingSecret .Values.trial.redis.enabled -}}
{{- with .Values.networkPolicy.egress -}}
{{ include "lorary.egress" (dict "to" .brokerTo "ports" .brokerPorts) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lorary.egressS3" -}}
{{- $ports := .Values.networkPolicy.egress.s3Ports -}}
{{- if .Values.trial.s3.enabled -}}{{- $ports = append $ports 8333 -}}{{- end -}}
{{ include "lorary.egress" (dict "to" .Values.networkPolicy.egress.s3To "ports" $ports) }}
{{- end -}}

{{- define "lorary.egressTracing" -}}
{{- if .Values.tracing.endpoint -}}
{{- with .Values.networkPolicy.egress -}}
{{ include "lorary.egress" (dict "to" .tracingTo "ports" .tracingPorts) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lorary.egressOutbound" -}}
{{- with .Values.networkPolicy.egress -}}
{{ include "lorary.egress" (dict "to" .outboundTo "ports" .outboundPorts) }}
{{- end -}}
{{- end -}}

{{- define "lorary.egressApi" -}}
- to:
    - podSelector:
        matchLabels: {{- include "lorary.selector" (dict "root" $ "component" "api") | nindent 10 }}
  ports:
    - {protocol: TCP, port: http}
{{- end -}}
