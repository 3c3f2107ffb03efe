{{- define "lorary.registerPod" -}}
{{- $path := include "lorary.modelPath" . -}}
{{- $what := dict "root" .root "component" "register" "account" "migrate" "image" "api" "values" .root.Values.migrate -}}
metadata: {{- include "lorary.podMetadata" $what | nindent 2 }}
spec:
  restartPolicy: OnFailure
  {{- include "lorary.podFields" $what | nindent 2 }}
  initContainers:
    {{- if .runtime.model.fetch.repository }}
    {{- include "lorary.fetchModel" (dict "root" .root "runtime" .runtime "path" $path) | nindent 4 }}
    {{- end }}
    - name: wait-for-registry
      image: {{ include "lorary.image" $what }}
      imagePullPolicy: {{ .root.Values.images.api.pullPolicy }}
      args: [wait, --timeout, {{ .root.Values.api.waitForSchemaS | quote }}]
      {{- include "lorary.clientContainer" .root | nindent 6 }}
  containers:
    - name: register
      image: {{ include "lorary.image" $what }}
      imagePullPolicy: {{ .root.Values.images.api.pullPolicy }}
      args:
        - base-models
        - add
        - --timeout
        - "1800"
        {{- range .runtime.model.upstreamNames }}
        - --upstream-name
        - {{ . | quote }}
        {{- end }}
        - {{ default .name .runtime.baseModel | quote }}
        - {{ $path | quote }}
      {{- include "lorary.clientContainer" .root | nindent 6 }}
  volumes:
    {{- include "lorary.scratchVolumes" "256Mi" | nindent 4 }}
    {{- include "lorary.secretsVolume" (dict "root" .root "secrets" (list "apiKey")) | nindent 4 }}
    {{- if .runtime.model.fetch.repository }}
    {{- include "lorary.modelCacheVolume" .root | nindent 4 }}
    {{- end }}
    {{- include "lorary.hubTokenVolume" .runtime | nindent 4 }}
{{- end -}}

{{/* A container that runs the `lorary` command against the registry, with the admin key. */}}
{{- define "lorary.clientContainer" -}}
env:
  - {name: HOME, value: /tmp}
  - {name: LORARY_STATE_DIR, value: /var/lib/lorary}
  - {name: LORARY_SECRETS_DIR, value: /run/secrets/lorary}
  - {name: LORARY_URL, value: {{ include "lorary.url" . | quote }}}
resources: {{- toYaml .Values.tests.resources | nindent 2 }}
securityContext: {{- include "lorary.containerSecurity" . | nindent 2 }}
volumeMounts:
  {{- include "lorary.scratchMounts" . | nindent 2 }}
  {{- include "lorary.secretsMount" . | nindent 2 }}
{{- end -}}
