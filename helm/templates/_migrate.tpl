{{- define "lorary.migratePod" -}}
{{- $what := dict "root" $ "component" "migrate" "account" "migrate" "image" "api" "values" .Values.migrate -}}
metadata: {{- include "lorary.podMetadata" $what | nindent 2 }}
spec:
  restartPolicy: OnFailure
  {{- include "lorary.podFields" $what | nindent 2 }}
  containers:
    - name: migrate
      image: {{ include "lorary.image" $what }}
      imagePullPolicy: {{ .Values.images.api.pullPolicy }}
      args: [db, init, --timeout, {{ .Values.migrate.waitS | quote }}]
      env: {{- include "lorary.env" . | nindent 8 }}
      resources: {{- toYaml .Values.migrate.resources | nindent 8 }}
      securityContext: {{- include "lorary.containerSecurity" . | nindent 8 }}
      volumeMounts:
        {{- include "lorary.scratchMounts" . | nindent 8 }}
        {{- include "lorary.secretsMount" . | nindent 8 }}
  volumes:
    {{- include "lorary.scratchVolumes" "256Mi" | nindent 4 }}
    {{- include "lorary.secretsVolume" (dict "root" $ "secrets" (list "app" "system" "owner" "secretKey" "previous" "firstAdmin" "replicaKey")) | nindent 4 }}
{{- end -}}
